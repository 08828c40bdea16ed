"""Run a sample of the fault campaigns of tests/faults.py, and check that they find faults. No clock is judged here."""

import argparse
import json
from pathlib import Path
from typing import Any

import faults
import pytest
from ranks import endurance
from ranks.processes import rows

from slurm import losses


def options(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **({"seed": 0, "kills": 6, "ways": None, "agents": 0, "steps": 300, "every": 0.3} | values)
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one process", "two ranks"])
def test_killed_again_and_again_a_run_ends_with_the_bits_of_the_undisturbed_one(tmp_path: Path, way: str) -> None:
    result = faults.kills(options(ways=[way]), tmp_path)
    assert faults.is_good("kills", result), result
    assert len(result["kills"]) == 6
    assert f"| {way} |" in faults.kills_table(result)


@pytest.mark.slow
def test_torchrun_restarts_and_a_killed_agent_leaves_no_orphan(tmp_path: Path) -> None:
    result = faults.elastic(options(kills=2, agents=1), tmp_path)
    assert len(result["kills"]) == 2
    assert [(row["workers"], row["left"]) for row in result["agents"]] == [(2, 0)]
    assert "of 2 killed workers" in faults.elastic_table(result)


def test_the_campaign_sees_what_is_wrong(tmp_path: Path) -> None:
    training = faults.Training("one process", tmp_path / "run", 30)
    training.wait()
    summary = json.loads((training.run / "summary.json").read_text())
    sound = {"runs": 1, "other bits": False, "doubled steps": 0, "missing steps": 0, "temporaries": 0, "orphans": 0}
    assert faults.examine(training, summary, 30) == sound
    (training.run / "checkpoints" / ".writing-step-00000030").mkdir()
    log = training.run / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps(rows(training.run, "train")[3]) + "\n")
    found = faults.examine(training, summary | {"weights_sha256": "other"}, 31)
    assert found == sound | {"other bits": True, "doubled steps": 1, "missing steps": 1, "temporaries": 1}
    again = {"totals": sound, "kills": [{"recomputed": faults.EVERY_STEPS + 1}]}
    assert not faults.is_good("kills", again)


def test_long_run_reports_slopes(tmp_path: Path) -> None:
    result = endurance.campaign(options(), tmp_path)
    assert faults.is_good("long", result)
    assert result["steps"] == 300
    assert {"step_ms", "rank 0 resident_mib", "rank 1 threads", "rank 1 descriptors", "rank 0 disk_mib"} <= result[
        "slopes"
    ].keys()
    assert "| rank 0 resident_mib |" in endurance.table(result)


def test_campaign_of_lost_nodes_sees_what_is_wrong() -> None:
    row = {"how": "kill", "left": 2, "first": False, "requeued": False, "notice_seconds": 9.0, "seconds": 9.0}
    row |= {"recomputed": 9}
    totals = {"runs": 1, "other bits": 0}
    assert losses.is_good({"totals": totals, "losses": [row]})
    assert not losses.is_good({"totals": totals | {"other bits": 1}, "losses": [row]})
    for change in ({"requeued": True}, {"first": True}, {"left": 1}, {"seconds": 31.0}, {"recomputed": 11}):
        assert not losses.is_good({"totals": totals, "losses": [row | change]})

"""Rows that are read late, as on a GPU: the same rows, the same decisions on all ranks, and none that is lost."""

import json
import signal
from pathlib import Path

import pytest
from ranks.processes import Ranks, arguments, rows, train, wait_for_step

FLAGS = "--model.name tiny_bn --train.micro_batches 4 --optim.ema 0.9 --train.exact true --train.max_steps 60 --log.every_steps 3"
CLOCKS = {"time", "images_per_second", "train_seconds", "seconds_left", "rank_seconds"}


def without_clocks(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows(run) if row["event"] not in ("start", "preempted")]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("cadence", ["", "--eval.every_steps 7 --checkpoint.every_steps 11", "--log.every_steps 1"])
def test_late_rows_are_the_same_rows(tmp_path: Path, world_size: int, cadence: str) -> None:
    summaries = []
    for name, mutant in (("now", ""), ("late", "accidents.runs_ahead")):
        summaries.append(train(world_size, tmp_path / name, FLAGS, cadence, MUTANT=mutant))
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    assert summaries[0]["fingerprints"] == summaries[1]["fingerprints"]
    now, late = ([row for row in without_clocks(tmp_path / name) if row["event"] != "fingerprint"] for name in ("now", "late"))
    assert now == late  # fingerprints, too, but cut into other stretches
    seconds = [row["train_seconds"] for row in rows(tmp_path / "late", "train")]
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(summaries[1]["train_seconds"], abs=0.001)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_is_seen_late_and_loses_no_step(tmp_path: Path, world_size: int) -> None:
    flags = (FLAGS, "--train.max_steps 300 --eval.every_steps 1000 --checkpoint.every_steps 1000")
    undisturbed = train(world_size, tmp_path / "undisturbed", *flags)
    ranks = Ranks(world_size, arguments(tmp_path / "told", *flags), tmp_path / "logs", MUTANT="accidents.runs_ahead")
    wait_for_step(tmp_path / "told", 30)
    ranks.signal(signal.SIGTERM, rank=world_size - 1)
    assert set(ranks.wait()) == {75}, ranks.output()
    told = json.loads((tmp_path / "told" / "summary.json").read_text())
    assert max(row["step"] for row in rows(tmp_path / "told", "train")) == told["step"] // 3 * 3
    resumed = train(world_size, tmp_path / "told", *flags, MUTANT="accidents.runs_ahead")
    assert resumed["weights_sha256"] == undisturbed["weights_sha256"]
    assert resumed["fingerprints"]["sha256"] == undisturbed["fingerprints"]["sha256"]
    assert rows(tmp_path / "told", "start")[1]["step"] == told["step"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_broken_number_is_seen_late_by_all_ranks_at_once(tmp_path: Path, world_size: int) -> None:
    run, broken = tmp_path / "run", {"MUTANT": "accidents.runs_ahead_with_broken_loss"}
    ranks = Ranks(world_size, arguments(run, FLAGS, "--log.every_steps 5"), tmp_path / "logs", **broken)
    assert set(ranks.wait()) == {1}
    assert ranks.output().count("of step 13 is not finite: loss inf in micro-batch 2") == 1
    assert "Traceback" not in ranks.output()
    assert [row["step"] for row in rows(run, "train")] == [5, 10]
    skipped = train(world_size, tmp_path / "skipped", FLAGS, "--optim.nonfinite skip", **broken)
    plain = train(1, tmp_path / "plain", FLAGS, "--optim.nonfinite skip", MUTANT="accidents.broken_loss")
    assert (skipped["skips"], skipped["weights_sha256"]) == (2, plain["weights_sha256"])
    assert [row["step"] for row in rows(tmp_path / "skipped", "skipped")] == [13, 16]

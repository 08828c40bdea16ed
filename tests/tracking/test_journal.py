"""Rows that are read late, as on a GPU, are the same rows with the same decisions on all ranks. None is lost."""

import json
import signal
from pathlib import Path

import pytest
from ranks.processes import Ranks, arguments, rows, train, wait_for_step

FLAGS = (
    "--model.name tiny_bn --train.num_micro_batches 4 --optim.ema 0.9 --train.exact true --train.max_steps 60 "
    "--log.every_steps 3 "
    "--log.slow_rank 0"
)
CLOCKS = {"time", "images_per_second", "train_seconds", "seconds_left", "rank_seconds"}


def without_clocks(run: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k not in CLOCKS}
        for row in rows(run)
        if row["event"] not in ("start", "preempted")
    ]


@pytest.mark.sample(2)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("cadence", ["", "--eval.every_steps 7 --checkpoint.every_steps 11", "--log.every_steps 1"])
def test_late_rows_are_the_same_rows(tmp_path: Path, world_size: int, cadence: str) -> None:
    summaries = []
    for name, mutant in (("now", ""), ("late", "accidents.runs_ahead")):
        summaries.append(train(world_size, tmp_path / name, FLAGS, cadence, MUTANT=mutant))
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    assert summaries[0]["fingerprints"] == summaries[1]["fingerprints"]
    now, late = (
        [row for row in without_clocks(tmp_path / name) if row["event"] != "fingerprint"] for name in ("now", "late")
    )
    assert now == late  # fingerprints, too, but over other spans of steps
    seconds = [row["train_seconds"] for row in rows(tmp_path / "late", "train")]
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(summaries[1]["train_seconds"], abs=0.001)


def test_rows_are_late_where_nothing_must_wait_and_only_there(tmp_path: Path) -> None:
    """An epoch has 23 steps of 64 examples. The host waits at its end and reads no step before."""
    lags = tmp_path / "lags"
    train(1, tmp_path / "run", FLAGS, MUTANT="accidents.runs_ahead", LAGS=str(lags))
    found = [tuple(map(int, line.split())) for line in lags.read_text().splitlines()]
    assert [step for step, _ in found] == [*range(3, 60, 3), 60]
    assert {step: at for step, at in found if at != step + 3} == {21: 23, 45: 46, 60: 60}


def test_ranks_with_unequal_shares_wait_for_each_other_at_the_same_steps(tmp_path: Path) -> None:
    """Tables that hold less than an epoch end at the same step on all ranks, whatever each rank's share of a batch."""
    flags = (FLAGS, "--train.max_steps 300 --eval.every_steps 1000 --checkpoint.every_steps 1000")
    late = {"MUTANT": "accidents.runs_ahead", "MOST_ROWS": "190"}
    undisturbed = train(3, tmp_path / "undisturbed", *flags, **late)
    assert undisturbed["weights_sha256"] == train(1, tmp_path / "one", *flags)["weights_sha256"]
    ranks = Ranks(3, arguments(tmp_path / "stopped", *flags), tmp_path / "logs", **late)
    wait_for_step(tmp_path / "stopped", 30)
    ranks.signal(signal.SIGTERM, rank=2)
    assert set(ranks.wait()) == {75}, ranks.output()
    assert train(3, tmp_path / "stopped", *flags, **late)["weights_sha256"] == undisturbed["weights_sha256"]


def test_ranks_stay_together_while_one_is_traced(tmp_path: Path) -> None:
    """Only rank 0 is traced, but all ranks read results where the trace begins and ends, so that all stop there."""
    flags = (FLAGS, "--log.every_steps 10 --train.profile_steps 20:25")
    broken = {"MUTANT": "accidents.runs_ahead_with_broken_loss", "STEP": "15"}
    ranks = Ranks(2, arguments(tmp_path / "run", *flags), tmp_path / "logs", **broken)
    assert ranks.wait() == [1, 1]
    assert ranks.output().count("error: The loss or the gradient of step 15 is not finite") == 1
    assert "Traceback" not in ranks.output()
    train(2, tmp_path / "traced", *flags, MUTANT="accidents.runs_ahead")
    log = (tmp_path / "traced-logs" / "rank-0.log").read_text()
    assert "steps 21 to 25 of rank 0 are traced in" in log


def test_late_results_count_skips_in_their_order(tmp_path: Path) -> None:
    """Of several broken steps read at once, the first one over the limit stops the run. Those before it have rows."""
    flags = (FLAGS, "--log.every_steps 20 --optim.nonfinite skip --optim.max_skips 1")
    ranks = Ranks(
        2, arguments(tmp_path / "run", *flags), tmp_path / "logs", MUTANT="accidents.runs_ahead_with_broken_loss"
    )
    assert ranks.wait() == [1, 1]
    assert "of step 16 is not finite" in ranks.output()
    assert "after optim.max_skips 1 skipped steps" in ranks.output()
    assert [row["step"] for row in rows(tmp_path / "run", "skipped")] == [13]


@pytest.mark.sample(1)
@pytest.mark.parametrize("world_size", [2, 1])
def test_a_signal_is_seen_late_and_loses_no_step(tmp_path: Path, world_size: int) -> None:
    flags = (FLAGS, "--train.max_steps 300 --eval.every_steps 1000 --checkpoint.every_steps 1000")
    undisturbed = train(world_size, tmp_path / "undisturbed", *flags)
    ranks = Ranks(world_size, arguments(tmp_path / "stopped", *flags), tmp_path / "logs", MUTANT="accidents.runs_ahead")
    wait_for_step(tmp_path / "stopped", 30)
    ranks.signal(signal.SIGTERM, rank=world_size - 1)
    assert set(ranks.wait()) == {75}, ranks.output()
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert max(row["step"] for row in rows(tmp_path / "stopped", "train")) == summary["step"] // 3 * 3
    resumed = train(world_size, tmp_path / "stopped", *flags, MUTANT="accidents.runs_ahead")
    assert resumed["weights_sha256"] == undisturbed["weights_sha256"]
    assert resumed["fingerprints"]["sha256"] == undisturbed["fingerprints"]["sha256"]
    assert rows(tmp_path / "stopped", "start")[1]["step"] == summary["step"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("world_size", [2, 1])
def test_a_broken_number_is_seen_late_by_all_ranks_at_once(tmp_path: Path, world_size: int) -> None:
    run, broken = tmp_path / "run", {"MUTANT": "accidents.runs_ahead_with_broken_loss"}
    ranks = Ranks(world_size, arguments(run, FLAGS, "--log.every_steps 5"), tmp_path / "logs", **broken)
    assert set(ranks.wait()) == {1}
    assert ranks.output().count("of step 13 is not finite: loss inf in micro-batch 2") == 1
    assert "Traceback" not in ranks.output()
    assert [row["step"] for row in rows(run, "train")] == [5, 10]
    skipped = train(world_size, tmp_path / "skipped", FLAGS, "--optim.nonfinite skip", **broken)
    plain = train(1, tmp_path / "plain", FLAGS, "--optim.nonfinite skip", MUTANT="accidents.broken_loss")
    assert (skipped["skipped_steps"], skipped["weights_sha256"]) == (2, plain["weights_sha256"])
    assert [row["step"] for row in rows(tmp_path / "skipped", "skipped")] == [13, 16]

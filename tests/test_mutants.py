"""Laws of a run that `launch selftest` leaves to these tests, each with the deliberate bug that breaks it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ranks.crashpoints import REPORT, is_whole
from ranks.processes import Ranks, arguments, rows, train

from launch.check.selftest import BATCH, NUM_TRAIN, STEPS_PER_EPOCH

# The weights do not change: the loss of a step depends only on its examples and its random numbers.
FROZEN = "--optim.lr 1e-30 --eval.every_steps 1000 --checkpoint.every_steps 1000 --log.every_steps 1"
ONE_EXAMPLE = f"{FROZEN} --data.validation 1437 --train.max_steps 12"
TWO_EPOCHS = f"{FROZEN} --train.epochs 2 --train.num_micro_batches 5 --train.global_batch_size {BATCH}"


def losses(run: Path, mutant: str, *flags: str) -> list[float]:
    train(1, run, *flags, MUTANT=mutant)
    return [row["loss"] for row in rows(run, "train")]


def holds_or_is_broken_by(*mutants: str) -> Any:
    """Parametrize a test with `mutant` and whether its law `holds`."""
    return pytest.mark.parametrize(("mutant", "holds"), [("", True), *((mutant, False) for mutant in mutants)])


@holds_or_is_broken_by("not_reshuffled")
def test_order_of_examples_changes_with_the_epoch(tmp_path: Path, mutant: str, holds: bool) -> None:
    found = losses(tmp_path / "run", mutant, TWO_EPOCHS)
    equal = sum(one == other for one, other in zip(found, found[STEPS_PER_EPOCH:], strict=False))
    assert len(found) == 2 * STEPS_PER_EPOCH
    assert (equal <= STEPS_PER_EPOCH // 4) == holds


@holds_or_is_broken_by("doubled_example_without_coverage_checksum", "mean_of_means")
def test_each_example_has_the_same_weight_in_every_epoch(tmp_path: Path, mutant: str, holds: bool) -> None:
    found = losses(tmp_path / "run", mutant, TWO_EPOCHS)
    sizes = [min(BATCH, NUM_TRAIN - step * BATCH) for step in range(STEPS_PER_EPOCH)]
    sums = [
        math.fsum(loss * size for loss, size in zip(found[start:], sizes, strict=False))
        for start in (0, STEPS_PER_EPOCH)
    ]
    assert (abs(sums[0] - sums[1]) / sums[0] < 3e-7) == holds, sums


@pytest.mark.parametrize(
    ("flags", "mutant", "is_fresh"),
    [
        ("--model.dropout 0.5", "", True),
        ("--model.dropout 0.5", "constant_dropout", False),
        ("--augment.shift 2 --augment.rotate 10", "", True),
        ("--augment.shift 2 --augment.rotate 10", "constant_augmentation", False),
    ],
)
def test_random_numbers_are_fresh_in_every_step(tmp_path: Path, flags: str, mutant: str, is_fresh: bool) -> None:
    found = losses(tmp_path / "run", mutant, ONE_EXAMPLE, flags)
    assert (len(set(found)) > len(found) // 2) == is_fresh, found


@holds_or_is_broken_by("lr_times_world")
def test_learning_rate_is_a_closed_form_of_the_step(tmp_path: Path, mutant: str, holds: bool) -> None:
    steps, highest = 24, 0.05
    train(2, tmp_path / "run", f"--train.max_steps {steps} --optim.lr {highest} --log.every_steps 1", MUTANT=mutant)

    def one_cycle(step: int) -> float:
        rise = 0.2 * steps
        if step < rise:
            return highest * (1 / 25 + 24 / 25 * (1 - math.cos(math.pi * step / rise)) / 2)
        return highest * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2

    found = [row["lr"] for row in rows(tmp_path / "run", "train")]
    assert (found == pytest.approx([one_cycle(step) for step in range(steps)], rel=1e-12, abs=1e-14)) == holds


@holds_or_is_broken_by("delete_before_write", "written_in_place")
def test_crash_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path, mutant: str, holds: bool) -> None:
    run = tmp_path / "run"
    flags = arguments(run, "--train.epochs 2 --checkpoint.every_steps 7 --checkpoint.keep 1")
    ranks = Ranks(1, [str(run / "checkpoints"), *flags], tmp_path / "logs", "ranks.crashpoints", MUTANT=mutant)
    assert ranks.wait() == [0], ranks.output()
    report = json.loads((run / REPORT).read_text())
    assert report["points"] > 0
    assert (report["violations"] == []) == holds, report


@holds_or_is_broken_by("temporary_left")
def test_run_leaves_whole_checkpoints_and_nothing_temporary(tmp_path: Path, mutant: str, holds: bool) -> None:
    train(1, tmp_path / "run", "--train.epochs 2 --checkpoint.every_steps 7", MUTANT=mutant)
    paths = list((tmp_path / "run" / "checkpoints").iterdir())
    assert paths
    assert all(path.name.startswith("step-") and is_whole(path) for path in paths) == holds, paths

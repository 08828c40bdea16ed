"""What must be true of the trainings of `launch selftest`: one function per law, each -> (holds, the figures).

Invariant: a law judges what the runs wrote (metrics.jsonl, summary.json, checkpoints) by arithmetic of its own and calls
nothing of the trainer, so a bug cannot be on both sides.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from launch.check.crashpoints import REPORT, is_whole

NUM_TRAIN, NUM_TEST = 1438, 359  # of digits
BATCH, SAVE_STEPS, LR = 95, 7, 0.05  # the last batch of an epoch has 13 examples
STEPS_PER_EPOCH = math.ceil(NUM_TRAIN / BATCH)
Verdict = tuple[bool, str]


class Trace:
    """What a run left in its directory."""

    def __init__(self, run: Path) -> None:
        self.checkpoints = run / "checkpoints"
        self.rows: list[dict[str, Any]] = [
            json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        self.summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
        report = run / REPORT
        self.crash_points: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}

    def column(self, event: str, *fields: str) -> list[tuple[Any, ...]]:
        """The fields of all rows of an event."""
        return [tuple(row[field] for field in fields) for row in self.rows if row["event"] == event]


@dataclass(frozen=True)
class Evidence:
    """The runs: undisturbed; killed and resumed; and with frozen weights, for what the losses then depend on alone."""

    alone: Trace
    moved: Trace
    order: Trace  # no randomness but the order
    dropout: Trace  # one example, no randomness but dropout
    augment: Trace  # one example, no randomness but augmentation
    killed_at: int  # the last step that was logged before the kill
    worlds: tuple[int, int]  # world sizes before and after the kill
    epochs: int  # of `alone` and `moved`

    @property
    def steps(self) -> int:
        """Steps of `alone` and `moved`."""
        return self.epochs * STEPS_PER_EPOCH


def _same_weights(found: Evidence) -> Verdict:
    names = ("weights_sha256", "ema_weights_sha256")
    alone, moved = ([str(trace.summary.get(name))[:12] for name in names] for trace in (found.alone, found.moved))
    path = f"1 process, and {found.worlds[0]} killed, then {found.worlds[1]}"
    shown = [one if one == other else f"{one} != {other}" for one, other in zip(alone, moved, strict=True)]
    return alone == moved and "None" not in alone, f"SHA-256 {shown[0]}, averaged {shown[1]}: {path}"


def _same_losses(found: Evidence) -> Verdict:
    alone, moved = (trace.column("train", "step", "loss", "grad_norm") for trace in (found.alone, found.moved))
    for one, other in zip_longest(alone, moved):
        if one != other:
            return False, f"first difference in (step, loss, gradient norm): {one} != {other}"
    return len(alone) > 0, f"{len(alone)} losses and gradient norms are equal to the last bit"


def _each_step_once(found: Evidence) -> Verdict:
    expected = list(range(1, found.steps + 1))
    for trace in (found.alone, found.moved):
        steps = [step for (step,) in trace.column("train", "step")]
        if steps != expected:
            doubled, missing = len(steps) - len(set(steps)), len(set(expected) - set(steps))
            return False, f"{len(steps)} rows for {found.steps} steps: {doubled} doubled, {missing} missing"
    return True, f"{found.steps} rows for {found.steps} steps, none doubled, none missing"


def _each_example_once(found: Evidence) -> Verdict:
    for trace in (found.alone, found.moved):
        for path in trace.checkpoints.glob("step-*/state.json"):
            state = json.loads(path.read_text())
            expected = state["step"] % STEPS_PER_EPOCH * BATCH
            if state["ledger"]["count"] != expected:
                return (
                    False,
                    f"the ledger has {state['ledger']['count']} examples at step {state['step']}, not {expected}",
                )
    losses = [loss for (loss,) in found.order.column("train", "loss")]
    rows = [min(BATCH, NUM_TRAIN - step % STEPS_PER_EPOCH * BATCH) for step in range(len(losses))]
    sums = [
        math.fsum(loss * num for loss, num in zip(losses[start : start + STEPS_PER_EPOCH], rows[start:], strict=False))
        for start in range(0, len(losses), STEPS_PER_EPOCH)
    ]
    spread = (max(sums) - min(sums)) / sums[0]
    figures = f"with frozen weights the loss over {NUM_TRAIN} examples is {sums[0]:.4f} in every epoch, to {spread:.0e}"
    return len(sums) > 1 and spread < 3e-7, figures


def _order_changes(found: Evidence) -> Verdict:
    losses = [loss for (loss,) in found.order.column("train", "loss")]
    equal = sum(one == other for one, other in zip(losses, losses[STEPS_PER_EPOCH:], strict=False))
    total = len(losses) - STEPS_PER_EPOCH
    return total > 0 and equal <= total // 4, f"{equal} of {total} batches are the same in the next epoch"


def _is_fresh(trace: Trace) -> Verdict:
    losses = [loss for (loss,) in trace.column("train", "loss")]
    return len(set(losses)) > len(
        losses
    ) // 2, f"one example, frozen weights: {len(set(losses))} losses in {len(losses)} steps"


def _evaluation(found: Evidence) -> Verdict:
    names = [
        f"{prefix}test_{field}"
        for prefix in ("", "ema_")
        for field in ("correct", "loss", "predictions_sha256", "confusion")
    ]
    different = [name for name in names if found.alone.summary[name] != found.moved.summary[name]]
    if different:
        return False, f"{', '.join(different)} differ"
    fields = ("step", "ema", "num_examples", "correct", "accuracy", "loss")
    alone, moved = (trace.column("eval", *fields) for trace in (found.alone, found.moved))
    for one, other in zip_longest(alone, moved):
        if one != other:
            return False, f"first difference in {fields}: {one} != {other}"
        if one[2] != NUM_TEST or one[4] != one[3] / NUM_TEST:
            return False, f"{one[3]} of {one[2]} examples, accuracy {one[4]}: the test split has {NUM_TEST}"
    summary = found.alone.summary
    predictions = summary["test_predictions_sha256"][:12]
    return len(
        alone
    ) == 2 * found.epochs, f"{len(alone)} times {NUM_TEST} examples; predictions {predictions} on both paths"


def _learning_rate(found: Evidence) -> Verdict:
    def one_cycle(step: int) -> float:
        rise = 0.2 * found.steps
        if step < rise:
            return LR * (1 / 25 + 24 / 25 * (1 - math.cos(math.pi * step / rise)) / 2)
        return LR * (1 + math.cos(math.pi * (step - rise) / (found.steps - rise))) / 2

    worst = max(
        abs(lr - one_cycle(step - 1)) / LR
        for trace in (found.alone, found.moved)
        for step, lr in trace.column("train", "step", "lr")
    )
    return worst < 1e-12, f"the closed form of the step on every world size, to {worst:.0e}"


def _resume(found: Evidence) -> Verdict:
    starts = found.moved.column("start", "world_size", "step")
    if [world for world, _ in starts] != list(found.worlds):
        return False, f"world sizes {[world for world, _ in starts]}, expected {list(found.worlds)}"
    resumed = starts[-1][1]
    figures = (
        f"killed after step {found.killed_at}, went on from {resumed}: at most {SAVE_STEPS} steps may be computed again"
    )
    return resumed > 0 and found.killed_at - resumed <= SAVE_STEPS, figures


def _checkpoints(found: Evidence) -> Verdict:
    paths = sorted(path for trace in (found.alone, found.moved) for path in trace.checkpoints.iterdir())
    bad = [path.name for path in paths if not path.name.startswith("step-") or not is_whole(path)]
    if bad:
        return False, f"temporary or not whole: {', '.join(bad)}"
    return len(paths) > 0, f"{len(paths)} checkpoints, all whole, nothing temporary beside them"


def _crash_points(found: Evidence) -> Verdict:
    points, violations = found.alone.crash_points["points"], found.alone.crash_points["violations"]
    if violations:
        return False, f"{len(violations)} of {points} crash points, first: {violations[0]}"
    return points > 0, f"at {points} file operations a crash would have left a whole checkpoint, and no other"


LAWS: dict[str, Callable[[Evidence], Verdict]] = {
    "same weights": _same_weights,
    "same losses": _same_losses,
    "each step once": _each_step_once,
    "each example once": _each_example_once,
    "order changes": _order_changes,
    "dropout changes": lambda found: _is_fresh(found.dropout),
    "augmentation changes": lambda found: _is_fresh(found.augment),
    "evaluation": _evaluation,
    "learning rate": _learning_rate,
    "resume": _resume,
    "checkpoints whole": _checkpoints,
    "crash points": _crash_points,
}


def judge(found: Evidence) -> dict[str, Verdict]:
    """Apply every law."""
    return {name: law(found) for name, law in LAWS.items()}

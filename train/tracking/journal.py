"""Collect the results of steps from the device, check them and log them; on a GPU later, without waiting.

Invariant: all ranks collect the same results at the same step. They find the same broken numbers and the same request
to stop, and act on it together. A GPU never idles because a row of the log is written.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.errors import RunError
from train.functional import optim
from train.functional.tables import StepResult
from train.state import Plan, State
from train.tracking import fingerprint
from train.tracking.alarms import Alarms
from train.tracking.metrics import Metrics
from train.world import signals

MAX_NAMED_EXAMPLES = 8  # of a broken micro-batch, in the error


@dataclass(frozen=True)
class Pending:
    """Results that are on their way to the host."""

    first: int  # of the steps first + 1 to last
    last: int
    should_log: bool  # whether the last step gets a row
    num_examples: int  # of these steps
    results: Tensor
    mark: Any  # when the last step ended


class Journal:
    """The results of one process: collected, checked, logged. Also its stopwatch."""

    def __init__(self, plan: Plan, state: State, metrics: Metrics, alarms: Alarms) -> None:
        self.plan, self.state, self.metrics, self.alarms = plan, state, metrics, alarms
        self.world = plan.world
        self.collected = state.step  # steps whose results have been collected
        self.pending: list[Pending] = []
        self.unlogged: list[StepResult] = []  # of the steps since the last row of the log
        self.fingerprints: list[StepResult] = []  # in exact mode, not yet written
        self.started = self._mark()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the stopwatch inside: the time does not count as training. The results so far are processed first."""
        self.collect(should_log=False, should_sync=True)
        yield
        self.started = self._mark()

    def collect(self, *, should_log: bool, should_sync: bool) -> bool:
        """Collect the results of the steps since the last call, if either is due.

        On a GPU, unless `should_sync`, they are processed in the next call, when they have arrived. Returns whether any
        rank was asked to stop; all results are processed then. Raises RunError for broken numbers.
        """
        should_wait = should_sync or not self.world.runs_ahead
        if not (should_log or should_wait):
            return False
        first, last = self.collected, self.state.step
        if last > first:
            num_examples = sum(self.plan.sampler.batch_rows(step) for step in range(first, last))
            results = self.plan.tables.fetch_results(first, last)
            self.pending.append(Pending(first, last, should_log, num_examples, results, self._mark()))
            self.collected = last
        is_stop_requested = self._process(keep=0 if should_wait else 1)
        if is_stop_requested:
            self._process(keep=0)
        return is_stop_requested

    def _process(self, keep: int) -> bool:
        """Check and log all pending results but the newest `keep`; return whether any rank was asked to stop."""
        timing = self.state.timing
        is_stop_requested = self.world.world_size == 1 and signals.requested() is not None
        while len(self.pending) > keep:
            pending = self.pending.pop(0)
            self.world.wait(pending.mark if keep else None)
            seconds, self.started = self._seconds_until(pending.mark), pending.mark
            timing.train_seconds += seconds
            timing.step_seconds += seconds
            timing.num_examples += pending.num_examples
            for result in self.plan.tables.decode_results(pending.first, pending.results):
                is_stop_requested |= result.stop_flags > 0
                self._check(result)
            if pending.should_log:
                self._log()
        return is_stop_requested

    def _mark(self) -> Any:
        """Return this moment in the device's work: an event on a GPU, seconds elsewhere."""
        if self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds_until(self, mark: Any) -> float:
        """Return the seconds since the stopwatch was started or read last."""
        return self.started.elapsed_time(mark) / 1000 if self.world.device.type == "cuda" else mark - self.started

    def _check(self, result: StepResult) -> None:
        """Raise RunError if the step's numbers are not finite, or record that its update was left out."""
        self.unlogged.append(result)
        if self.plan.config.train.exact:
            self.fingerprints.append(result)
        try:
            if not is_skipped(self.plan, self.state, result):
                return
        except RunError:
            self.record_fingerprints()  # they show at which step it went wrong
            raise
        num_skipped = self.state.skipped_steps
        self.metrics.say(
            f"warning: step {result.step} is skipped: its loss or gradient is not finite "
            f"({num_skipped} skipped so far)."
        )
        self.metrics.record("skipped", result.step, skipped_steps=num_skipped)

    def record_fingerprints(self) -> None:
        """Write the row of the steps since the last such row; in exact mode only."""
        if self.fingerprints:
            first, last = self.fingerprints[0].step, self.fingerprints[-1].step
            self.metrics.record("fingerprint", last, first=first, **fingerprint.encode(self.fingerprints))
            self.fingerprints.clear()

    def _log(self) -> None:
        """Write a row for the newest step. `rank_seconds` are means over the steps since the row before."""
        plan, timing, result = self.plan, self.state.timing, self.unlogged[-1]
        per_second = timing.num_examples / max(timing.step_seconds, 1e-9)
        self.record_fingerprints()
        # A step that was left out has no loss. In fp16 the norm overflows while the scale is being found.
        loss = result.loss if math.isfinite(result.loss) else None
        grad_norm = result.grad_norm if math.isfinite(result.grad_norm) else None
        if loss is not None:
            self.alarms.loss(result.step, loss)
        self.metrics.record(
            "train",
            result.step,
            epoch=result.step / plan.sampler.steps_per_epoch,
            loss=loss,
            lr=optim.lr(plan.config.optim, result.step - 1, plan.total_steps),
            grad_norm=grad_norm,
            rank_seconds=self.alarms.ranks(result.step, [each.rank_seconds for each in self.unlogged]),
            images_per_second=round(per_second, 1),
            train_seconds=round(timing.train_seconds, 4),
            seconds_left=round((plan.total_steps - result.step) * plan.sampler.global_batch_size / per_second, 1),
        )
        self.unlogged.clear()


def is_skipped(plan: Plan, state: State, result: StepResult) -> bool:
    """Return whether a step's update was left out, and count it. Call it for each step in turn.

    Raises RunError under optim.nonfinite stop, or when optim.max_skips is exceeded: on every rank after the same step.
    """
    if result.is_sound:
        return False
    state.skipped_steps += 1
    config = plan.config.optim
    if config.nonfinite == "stop" or state.skipped_steps > config.max_skips:
        before = "" if config.nonfinite == "stop" else f", after optim.max_skips {config.max_skips} skipped steps"
        raise RunError(
            f"The loss or the gradient of step {result.step} is not finite: {_blame(plan, result)}{before}. "
            "The last checkpoint is from before; try a smaller optim.lr, optim.clip_norm 1 or optim.nonfinite skip."
        )
    return True


def _blame(plan: Plan, result: StepResult) -> str:
    """Name the micro-batches of a step whose loss is broken, and the first one's examples."""
    losses, step = result.loss_sums, result.step - 1
    bad = [index for index, loss in enumerate(losses) if not abs(loss) < float("inf")]
    if not bad:
        return f"its {len(losses)} micro-batch(es) have finite losses, but the gradient norm is not finite"
    examples = plan.sampler.examples(step, *plan.sampler.micro_batch(step, bad[0])).tolist()
    named = ", ".join(map(str, examples[:MAX_NAMED_EXAMPLES])) + (", ..." if examples[MAX_NAMED_EXAMPLES:] else "")
    others = f" (and {len(bad) - 1} more)" if bad[1:] else ""
    return f"loss {losses[bad[0]]} in micro-batch {bad[0]}{others} of {len(losses)}, training examples {named}"

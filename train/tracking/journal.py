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

MAX_NAMED_EXAMPLES = 8  # of a broken micro-batch


@dataclass(frozen=True)
class Pending:
    """Results that are on their way to the host."""

    first: int  # they are of the steps after this one
    num_examples: int  # of these steps
    should_log: bool  # whether the last step gets a row
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
            self.pending.append(Pending(first, num_examples, should_log, results, self._mark()))
            self.collected = last
        is_stop_requested = self.world.world_size == 1 and signals.requested() is not None
        while len(self.pending) > (0 if should_wait or is_stop_requested else 1):
            is_stop_requested |= self._process(self.pending.pop(0))
        return is_stop_requested

    def _process(self, pending: Pending) -> bool:
        """Check and log results; return whether any rank was asked to stop."""
        self.world.wait(pending.mark)
        seconds, self.started = self._seconds_until(pending.mark), pending.mark
        timing = self.state.timing
        timing.train_seconds += seconds
        timing.step_seconds += seconds
        timing.num_examples += pending.num_examples
        results = self.plan.tables.decode_results(pending.first, pending.results)
        for result in results:
            self._check(result)
        if pending.should_log:
            self._log()
        return any(result.stop_flags for result in results)

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
        """Keep the step's numbers. If they are not finite, record that its update was left out, or raise RunError."""
        self.unlogged.append(result)
        if self.plan.config.train.exact:
            self.fingerprints.append(result)
        if result.is_sound:
            return
        self.state.skipped_steps += 1
        num_skipped, config = self.state.skipped_steps, self.plan.config.optim
        if config.nonfinite == "stop" or num_skipped > config.max_skips:
            self.record_fingerprints()  # they show at which step it went wrong
            before = "" if config.nonfinite == "stop" else f", after optim.max_skips {config.max_skips} skipped steps"
            raise RunError(
                f"The loss or the gradient of step {result.step} is not finite: {self._blame(result)}{before}. "
                "The last checkpoint is from before; try a smaller optim.lr, optim.clip_norm 1 or optim.nonfinite skip."
            )
        self.metrics.say(
            f"warning: step {result.step} is skipped: its loss or gradient is not finite "
            f"({num_skipped} skipped so far)."
        )
        self.metrics.record("skipped", result.step, skipped_steps=num_skipped)

    def _blame(self, result: StepResult) -> str:
        """Name the first micro-batch whose loss is broken, and its examples."""
        losses, sampler = result.loss_sums, self.plan.sampler
        bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        if not bad:
            return f"its {len(losses)} micro-batch(es) have finite losses, but the gradient norm is not finite"
        step = result.step - 1
        examples = sampler.examples(step, *sampler.micro_batch(step, bad[0]))[:MAX_NAMED_EXAMPLES].tolist()
        named = ", ".join(map(str, examples))
        return f"loss {losses[bad[0]]} in micro-batch {bad[0]} of {len(losses)}, whose first examples are {named}"

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

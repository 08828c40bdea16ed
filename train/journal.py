"""Collect the results of steps from the device, check them and log them; on a GPU later, without waiting.

Invariant: all ranks collect the same results at the same step. They find the same broken numbers and the same request to
stop, and act on it together. A GPU never idles because a row of the log is written.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.errors import RunError
from train.functional import optim
from train.functional.tables import StepResult
from train.run import Run
from train.step import is_left_out
from train.tracking import fingerprint
from train.tracking.alarms import Alarms
from train.tracking.metrics import Metrics
from train.world import signals


@dataclass(frozen=True)
class Pending:
    """Results that are on their way to the host."""

    first: int  # of the steps first + 1 to last
    last: int
    should_log: bool  # whether the last step gets a row
    num_examples: int  # that this process had trained on by then
    results: Tensor
    mark: Any  # when the last step ended


class Journal:
    """The results of one process: collected, checked, logged. Also its stopwatch."""

    def __init__(self, run: Run, metrics: Metrics, alarms: Alarms) -> None:
        self.run, self.metrics, self.alarms = run, metrics, alarms
        self.collected = run.step  # steps whose results have been collected
        self.pending: list[Pending] = []
        self.unlogged: list[StepResult] = []  # of the steps since the last row of the log
        self.fingerprints: list[StepResult] = []  # in exact mode, not yet written
        self.resume()

    def resume(self) -> None:
        """Start the stopwatch. Only what happens from here to the next `collect` counts as training."""
        self.started = self._mark()

    def pause(self) -> bool:
        """Process all steps so far and stop the stopwatch; return whether any rank was asked to stop."""
        return self.collect(should_log=False, wait=True)

    def collect(self, *, should_log: bool, wait: bool) -> bool:
        """Collect the results of the steps since the last call. Without `wait` they are processed in the next call.

        Returns whether any rank was asked to stop. All results have been processed then. Raises RunError for broken numbers.
        """
        run = self.run
        if run.step > self.collected:
            results = run.tables.fetch(self.collected, run.step)
            self.pending.append(Pending(self.collected, run.step, should_log, run.life_examples, results, self._mark()))
            self.collected = run.step
        stop_requested = self._process(keep=0 if wait else 1)
        if stop_requested:
            self._process(keep=0)
        return stop_requested

    def _process(self, keep: int) -> bool:
        """Check and log all pending results but the newest `keep`; return whether any rank was asked to stop."""
        run = self.run
        stop_requested = run.world.world_size == 1 and signals.requested() is not None
        while len(self.pending) > keep:
            pending = self.pending.pop(0)
            run.world.wait(pending.mark if keep else None)
            seconds, self.started = self._seconds_until(pending.mark), pending.mark
            run.train_seconds += seconds
            run.life_seconds += seconds
            for result in run.tables.decode(pending.first, pending.results):
                stop_requested |= result.stop_flags > 0
                self._check(result)
            if pending.should_log:
                self._log(pending)
        return stop_requested

    def _mark(self) -> Any:
        """Return this moment in the device's work: an event on a GPU, seconds elsewhere."""
        if self.run.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds_until(self, mark: Any) -> float:
        """Return the seconds since the stopwatch was started or read last."""
        return self.started.elapsed_time(mark) / 1000 if self.run.world.device.type == "cuda" else mark - self.started

    def _check(self, result: StepResult) -> None:
        """Stop if the step's numbers are not finite, or record that its update was left out."""
        run, metrics = self.run, self.metrics
        self.unlogged.append(result)
        if run.config.train.exact:
            self.fingerprints.append(result)
        try:
            left_out = is_left_out(run, result)
        except RunError:
            self.record_fingerprints()  # they show at which step it went wrong
            raise
        if left_out:
            metrics.say(
                f"warning: step {result.step} gave numbers that are not finite: no update ({run.skips} left out so far)."
            )
            metrics.record("skipped", result.step, skips=run.skips)

    def record_fingerprints(self) -> None:
        """Write the row of the steps since the last such row; in exact mode only."""
        if self.fingerprints:
            first, last = self.fingerprints[0].step, self.fingerprints[-1].step
            self.metrics.record("fingerprint", last, first=first, **encode(self.fingerprints))
            self.fingerprints.clear()

    def _log(self, pending: Pending) -> None:
        """Write the row of the last of some steps. Its seconds of each rank are means over the steps since the last row."""
        run, result = self.run, self.unlogged[-1]
        per_second = pending.num_examples / max(run.life_seconds, 1e-9)
        self.record_fingerprints()
        is_finite = math.isfinite(result.loss)
        if is_finite:
            self.alarms.loss(result.step, result.loss)
        self.metrics.record(
            "train",
            result.step,
            epoch=result.step / run.sampler.steps_per_epoch,
            loss=result.loss if is_finite else None,  # a step that was left out
            lr=optim.lr(run.config.optim, result.step - 1, run.total_steps),
            grad_norm=result.grad_norm
            if math.isfinite(result.grad_norm)
            else None,  # fp16 overflows while it finds its scale
            rank_seconds=self.alarms.ranks(result.step, [each.rank_seconds for each in self.unlogged]),
            images_per_second=round(per_second, 1),
            train_seconds=round(run.train_seconds, 4),
            seconds_left=round((run.total_steps - result.step) * run.sampler.global_batch_size / per_second, 1),
        )
        self.unlogged.clear()


def encode(results: list[StepResult]) -> dict[str, list[str]]:
    """Return the bits of each step's loss and gradient norm."""
    return {
        name: [fingerprint.encode(name, getattr(result, name)) for result in results] for name in ("loss", "grad_norm")
    }

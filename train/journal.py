"""Reads what the steps left on the device, checks it and writes it down, on a GPU late and without waiting.

Invariant: all ranks look at the same steps at the same step, so they find the same broken numbers and the same wish to stop,
and act on it together. Between two looks that must wait, a GPU never runs dry for a row of the log.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train import fingerprint, optim, preempt
from train.alarms import Alarms
from train.errors import RunError
from train.metrics import Metrics
from train.run import Run
from train.step import check_numbers
from train.tables import StepResult


@dataclass(frozen=True)
class Look:
    """A look at the steps since the one before, while its numbers are on their way to the host."""

    first: int  # the steps first + 1 to last
    last: int
    is_logged: bool
    num_examples: int  # that this process has trained on until then
    results: Tensor
    mark: Any  # when the last step ended


class Journal:
    """The looks of one process at its run."""

    def __init__(self, run: Run, metrics: Metrics, alarms: Alarms) -> None:
        self.run, self.metrics, self.alarms = run, metrics, alarms
        self.device = run.world.device
        self.looked = run.step  # steps that have been looked at
        self.pending: list[Look] = []
        self.unlogged: list[StepResult] = []  # of the steps since the last row of the log
        self.fingerprints: list[StepResult] = []  # in exact mode, not yet written
        self.resume()

    def _mark(self) -> Any:
        """Return this moment in the device's work: an event on a GPU, seconds elsewhere."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds_since_started(self, mark: Any) -> float:
        return mark - self.started if self.device.type != "cuda" else self.started.elapsed_time(mark) / 1000

    def resume(self) -> None:
        """Start the stopwatch: only what happens between here and a look counts as training."""
        self.started = self._mark()

    def look(self, *, is_logged: bool, wait: bool) -> bool:
        """Look at the steps since the last look, at the newest of them later unless `wait`.

        Returns whether any rank was told to stop; everything has been looked at then. Raises RunError for broken numbers.
        """
        run = self.run
        if run.step > self.looked:
            results = run.tables.fetch(self.looked, run.step)
            self.pending.append(Look(self.looked, run.step, is_logged, run.life_examples, results, self._mark()))
            self.looked = run.step
        stop = self._settle(0 if wait else 1)
        return stop and (self._settle(0) or True)

    def pause(self) -> None:
        """Look at every step, and stop the stopwatch until `resume`."""
        self.look(is_logged=False, wait=True)

    def _settle(self, keep: int) -> bool:
        """Check and write all pending looks but the newest `keep`; return whether any rank was told to stop."""
        stop = self.run.world.world_size == 1 and preempt.requested() is not None
        while len(self.pending) > keep:
            look = self.pending.pop(0)
            self.run.world.wait(None if keep == 0 else look.mark)
            seconds = self._seconds_since_started(look.mark)
            self.started = look.mark
            self.run.train_seconds += seconds
            self.run.life_seconds += seconds
            results = self.run.tables.decode(look.first, look.results)
            stop |= any(result.stop_flags for result in results)
            self._check(results)
            if look.is_logged:
                self._log(look)
        return stop

    def _check(self, results: list[StepResult]) -> None:
        """Check that the numbers are finite; stop, or write down which updates were left out."""
        run, metrics = self.run, self.metrics
        self.unlogged += results
        if run.config.train.exact:
            self.fingerprints += results
        try:
            skipped = check_numbers(run, results)
        except RunError:
            self.record_fingerprints()  # they say at which step it went wrong
            raise
        for step in skipped:
            metrics.say(f"warning: step {step} gave numbers that are not finite: no update ({run.skips} left out so far).")
            metrics.record("skipped", step, skips=run.skips)

    def record_fingerprints(self) -> None:
        """Write the row of the steps since the last such row; in exact mode only."""
        if self.fingerprints:
            first, last = self.fingerprints[0].step, self.fingerprints[-1].step
            self.metrics.record("fingerprint", last, first=first, **encode(self.fingerprints))
            self.fingerprints.clear()

    def _log(self, look: Look) -> None:
        """Write the row of a step; those before it are in its means."""
        run, result = self.run, self.unlogged[-1]
        per_second = look.num_examples / max(run.life_seconds, 1e-9)
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
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,  # fp16 overflows while it finds its scale
            rank_seconds=self.alarms.ranks(result.step, [each.rank_seconds for each in self.unlogged]),
            images_per_second=round(per_second, 1),
            train_seconds=round(run.train_seconds, 4),
            seconds_left=round((run.total_steps - result.step) * run.sampler.global_batch_size / per_second, 1),
        )
        self.unlogged.clear()


def encode(results: list[StepResult]) -> dict[str, list[str]]:
    """Return the bits of each step's loss and gradient norm."""
    return {name: [fingerprint.encode(name, getattr(result, name)) for result in results] for name in ("loss", "grad_norm")}

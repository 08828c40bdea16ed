"""Warnings from numbers that a run logs anyway: a loss that jumps, a rank that is slower than the others.

Invariant: the loss alarm is a function of the rows before, so a resume warns where an undisturbed run does. A slow rank is
about machines, not mathematics: it is named once in a life. Nothing here stops a run.
"""

import statistics
from collections import deque
from typing import Any

from train.config import LogConfig
from train.tracking.metrics import Metrics

WINDOW, LEAST_ROWS = 20, 5  # rows that a loss is compared with
LEAST_LOSS = 0.1  # below it a batch with one hard example would be a spike
LEAST_STEPS = 10  # that a rank's time is averaged over


def known_mean(seconds: list[float]) -> float:
    """Return the mean of the values that are known: on GPUs the first steps' are not yet, and come as 0."""
    return statistics.fmean([value for value in seconds if value] or [0.0])


class Alarms:
    """What the alarms remember; on ranks other than 0 they look at the same numbers and say nothing."""

    def __init__(self, config: LogConfig, metrics: Metrics, rows: list[dict[str, Any]]) -> None:
        self.config, self.metrics = config, metrics
        losses = (row["loss"] for row in rows if row["event"] == "train" and row.get("loss") is not None)
        self.losses = deque(losses, WINDOW)
        self.seconds: list[list[float]] = []
        self.named: set[int] = set()

    def loss(self, step: int, loss: float) -> None:
        """Look at a logged loss."""
        usual = max((LEAST_LOSS, *self.losses))
        if self.config.spike and len(self.losses) >= LEAST_ROWS and loss > self.config.spike * usual:
            times = f"{loss / usual:.1f} times the largest of the {len(self.losses)} rows before, {usual:.4f}"
            self.metrics.say(f"warning: the loss of step {step} jumped to {loss:.4f}, {times}.")
            self.metrics.record("spike", step, loss=loss, usual=usual)
        self.losses.append(loss)

    def ranks(self, step: int, seconds: list[list[float]]) -> list[float] | None:
        """Look at each rank's own seconds in the steps since the last row -> their means per rank; None with one rank."""
        if not seconds or len(seconds[0]) == 1:
            return None
        self.seconds += seconds
        if len(self.seconds) >= LEAST_STEPS:
            means = [known_mean(list(column)) for column in zip(*self.seconds, strict=True)]
            self.seconds.clear()
            median = statistics.median_low(means)
            for rank, mean in enumerate(means):
                if mean > self.config.slow_rank * median > 0 and rank not in self.named:
                    self.named.add(rank)
                    own, usual = f"{1e3 * mean:.1f} ms", f"{1e3 * median:.1f} ms"
                    self.metrics.say(
                        f"warning: rank {rank} works {own} on a step, the median rank {usual}: all wait for it."
                    )
                    self.metrics.record("slow_rank", step, rank=rank, seconds=mean, median_seconds=median)
        return [round(known_mean(list(column)), 6) for column in zip(*seconds, strict=True)]

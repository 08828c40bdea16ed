"""Warn of a loss that jumps and of a rank that is slower than the others, from numbers that a run logs anyway.

Invariant: the loss alarm is a function of the rows before, so a resumed run warns where an undisturbed one does. A slow
rank depends on the machine, so it is named once in an attempt. No alarm stops a run.
"""

import statistics
from collections import deque
from typing import Any

from train.config import LogConfig
from train.tracking.metrics import Metrics

WINDOW, MIN_ROWS = 20, 5  # rows that a loss is compared with
MIN_LOSS = 0.1  # below it, one hard example in a batch would count as a spike
MIN_STEPS = 10  # that a rank's time is averaged over


def means_by_rank(seconds: list[list[float]]) -> list[float]:
    """Return the mean of each column, without its zeros: on GPUs the times of the first steps are not measured yet."""
    columns = zip(*seconds, strict=True)
    return [statistics.fmean([value for value in column if value] or [0.0]) for column in columns]


class Alarms:
    """What the alarms remember. All ranks check the same numbers; rank 0 prints the warnings."""

    def __init__(self, config: LogConfig, metrics: Metrics, rows: list[dict[str, Any]]) -> None:
        self.config, self.metrics = config, metrics
        losses = (row["loss"] for row in rows if row["event"] == "train" and row.get("loss") is not None)
        self.losses = deque(losses, WINDOW)
        self.seconds: list[list[float]] = []
        self.named_ranks: set[int] = set()

    def loss(self, step: int, loss: float) -> None:
        """Check a logged loss."""
        usual = max((MIN_LOSS, *self.losses))
        if self.config.spike and len(self.losses) >= MIN_ROWS and loss > self.config.spike * usual:
            self.metrics.say(f"warning: the loss of step {step} jumped to {loss:.4f}, after at most {usual:.4f}.")
            self.metrics.record("spike", step, loss=loss, usual=usual)
        self.losses.append(loss)

    def ranks(self, step: int, seconds: list[list[float]]) -> list[float] | None:
        """Check each rank's own seconds in the steps since the last row. Return their means, or None with one rank."""
        if not seconds or len(seconds[0]) == 1:
            return None
        self.seconds += seconds
        if len(self.seconds) >= MIN_STEPS:
            means = means_by_rank(self.seconds)
            self.seconds.clear()
            median = statistics.median_low(means)
            for rank, mean in enumerate(means):
                if mean > self.config.slow_rank * median > 0 and rank not in self.named_ranks:
                    self.named_ranks.add(rank)
                    times = f"{1e3 * mean:.1f} ms per step, median {1e3 * median:.1f} ms"
                    self.metrics.say(f"warning: rank {rank} is slow: {times}. All ranks wait for it.")
                    self.metrics.record("slow_rank", step, rank=rank, seconds=mean, median_seconds=median)
        return [round(mean, 6) for mean in means_by_rank(seconds)]

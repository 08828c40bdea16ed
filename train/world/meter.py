"""How long a GPU works between a rank's waits for the others, measured with CUDA events.

The host only launches kernels, so the host's clock does not show a throttled GPU. Nothing here waits for the device:
the seconds of a step become known a few steps later.
"""

import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch


def record_event() -> Any:
    """Record a CUDA event with a time stamp in the current stream; return None during a CUDA graph's capture."""
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class DeviceMeter:
    """The device's seconds between `begin` and `end`, added up per step."""

    def __init__(self, record: Callable[[], Any] = record_event) -> None:
        self.record = record
        self.started: Any = None  # the event at which the current stretch of own work began
        self.stretches: list[tuple[Any, Any]] = []  # (start, end) of the current step
        self.steps: deque[list[tuple[Any, Any]]] = deque()  # earlier steps, which the device may not have finished
        self.latest = 0.0

    def begin(self) -> None:
        """Mark the start of own work in the current stream."""
        self.started = self.record()

    def end(self) -> None:
        """Mark the end of own work in the current stream."""
        ended = self.record()
        if self.started is not None and ended is not None:
            self.stretches.append((self.started, ended))
        self.started = None

    def forget(self) -> None:
        """Drop all work so far, such as that of a warm-up."""
        self.stretches, self.latest = [], 0.0
        self.steps.clear()

    def take_lap(self) -> float:
        """End a step; return the mean seconds of the steps that the device has finished since the last call.

        If it has finished none, return the previous mean, which is 0 at first.
        """
        self.steps.append(self.stretches)
        self.stretches = []
        seconds = []
        while self.steps and all(event.query() for stretch in self.steps[0] for event in stretch):
            seconds.append(sum(start.elapsed_time(end) for start, end in self.steps.popleft()) / 1000)
        if seconds:
            self.latest = statistics.fmean(seconds)
        return self.latest

"""How long a GPU works between a rank's waits for the others, from CUDA events.

The host only launches kernels, so its clock does not show a throttled GPU. Nothing here waits for the device: the seconds of
a step are known a few steps later.
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
        self.stretches: list[tuple[Any, Any]] = []  # (begin, end) of the current step
        self.steps: deque[list[tuple[Any, Any]]] = deque()  # steps whose events may still be ahead of the device
        self.latest = 0.0

    def begin(self) -> None:
        """Mark the begin of own work in the current stream."""
        self.started = self.record()

    def end(self) -> None:
        """Mark the end of own work in the current stream."""
        ended = self.record()
        if self.started is not None and ended is not None:
            self.stretches.append((self.started, ended))
        self.started = None

    def forget(self) -> None:
        """Forget all work so far, such as that of a warm-up."""
        self.stretches, self.latest = [], 0.0
        self.steps.clear()

    def lap(self) -> float:
        """End a step; return the mean seconds of the steps that have become known since the last call.

        If there are none, return the previous mean again: 0 until the first step is known.
        """
        self.steps.append(self.stretches)
        self.stretches = []
        seconds = []
        while self.steps and all(event.query() for stretch in self.steps[0] for event in stretch):
            seconds.append(sum(begin.elapsed_time(end) for begin, end in self.steps.popleft()) / 1000)
        if seconds:
            self.latest = statistics.fmean(seconds)
        return self.latest

"""CUDA graphs: the device's work in a step, recorded once and then started as a whole instead of kernel by kernel.

Invariant: what is recorded takes everything that changes from step to step out of tensors; a number that came from the host
would stay as it was (`tests/test_graphs.py` holds the step to that on any device).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # torch's advice: libraries choose and allocate in the first ones

Work = Callable[..., tuple[Tensor, ...]]


@dataclass
class Recording:
    """A function's graph, with the tensors that it reads and writes in each replay."""

    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], object]


def record(work: Work, state: Any, inputs: list[Tensor], pool: Any) -> Recording:
    """Record `work(state, *inputs)` on the current stream, which must not be the default one; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        outputs = work(state, *inputs)
    return Recording(inputs, outputs, graph.replay)


@dataclass
class Graphs:
    """Calls functions as they are at first, then records each of them once and replays it.

    They must be called in one fixed order, in all shapes the same: their graphs share memory.
    """

    pool: Any
    calls: dict[Work, int] = field(default_factory=dict)
    recordings: dict[Work, Recording] = field(default_factory=dict)

    @classmethod
    def open(cls, device: torch.device) -> "Graphs":
        """Move this thread's work on the device to a stream of its own, as recording demands."""
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(stream)
        return cls(torch.cuda.graph_pool_handle())

    def __call__(self, work: Work, state: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return `work(state, *inputs)`; `state` must be the same object in every call."""
        recording = self.recordings.get(work)
        if recording is None:
            self.calls[work] = self.calls.get(work, 0) + 1
            if self.calls[work] <= WARM_UP_CALLS:
                return work(state, *inputs)
            recording = self.recordings[work] = record(work, state, [tensor.clone() for tensor in inputs], self.pool)
        for kept, tensor in zip(recording.inputs, inputs, strict=True):
            kept.copy_(tensor)
        recording.replay()
        return tuple(output.clone() for output in recording.outputs)  # the next replay writes over them

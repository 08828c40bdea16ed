"""CUDA graphs: the device's work in a step, recorded once and then started as a whole instead of kernel by kernel.

Invariant: what is recorded takes everything that changes from step to step out of tensors; a number that came from the host
would stay as it was (`tests/world/test_graphs.py` holds the step to that on any device).
"""

from collections.abc import Callable

import torch

CALLS_BEFORE = 3  # torch's advice: libraries choose and allocate in the first ones


def leave_default_stream(device: torch.device) -> None:
    """Move this thread's work on the device to a stream of its own, as recording demands."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)


def record(work: Callable[[], object]) -> Callable[[], object]:
    """Record `work` on the current stream, and return what replays it; nothing is computed yet.

    Raises RuntimeError if something in it cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        work()
    return graph.replay

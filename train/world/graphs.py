"""CUDA graphs: the device's work in a step, recorded once and then started as a whole instead of kernel by kernel.

Invariant: recorded work reads everything that changes from step to step from tensors. A number that came from the host
would keep the value of the recording. `tests/world/test_graphs.py` checks the step for that, on any device.
"""

from collections.abc import Callable

import torch

CALLS_BEFORE = 3  # torch's advice: libraries choose algorithms and allocate memory in the first calls


def leave_default_stream(device: torch.device) -> None:
    """Move this thread's work on the device to a stream of its own, which recording requires."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)


def record(work: Callable[[], object]) -> Callable[[], object]:
    """Record `work` on the current stream without computing anything, and return the function that replays it.

    Raises RuntimeError if something in it cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        work()
    return graph.replay

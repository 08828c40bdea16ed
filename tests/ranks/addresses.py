"""Make three steps under DDP and print which operations of the update got a gradient at an odd address."""

from typing import Any

import torch
from in_process import Run
from torch.utils._python_dispatch import TorchDispatchMode

from train.cli import parse
from train.functional import optim
from train.world.world import World

ELEMENTWISE = ("_foreach_mul.Scalar",)  # may look at an address: no element depends on another one


class Addresses(TorchDispatchMode):
    """Record the operations on gradients, and those that got one at an address that is no multiple of 16."""

    def __init__(self, sizes: set[torch.Size]) -> None:
        super().__init__()
        self.sizes, self.operations, self.odd = sizes, 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        addresses = [tensor.data_ptr() for tensor in tensors if tensor.size() in self.sizes]
        self.operations += bool(addresses)
        if (
            any(address % optim.ALIGNMENT for address in addresses)
            and str(func).removeprefix("aten.") not in ELEMENTWISE
        ):
            self.odd.append(str(func))
        return func(*args, **(kwargs or {}))


def main(argv: list[str]) -> int:
    config = parse(argv)
    world = World.open(config.train)
    try:
        run, found = Run.open(config, world), []
        align = optim.align_gradients
        seen = Addresses({p.size() for p in run.state.parameters})

        def aligned(parameters: Any) -> None:  # all that follows is the update
            found.append({"odd in buckets": sum(p.grad.data_ptr() % optim.ALIGNMENT > 0 for p in parameters)})
            seen.__enter__()
            align(parameters)

        optim.align_gradients = aligned
        for _ in range(3):
            seen.operations, seen.odd = 0, []
            run.steps()
            seen.__exit__(None, None, None)
            found[-1] |= {"operations": seen.operations, "odd operations": seen.odd}
        print(found)
    finally:
        world.close()
    return 0

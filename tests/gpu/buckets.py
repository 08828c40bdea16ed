"""Check that results do not depend on where DDP's buckets put gradients, and that the exact tree works under DDP."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpu.inside import Check, Lab
from train.config import OptimConfig
from train.functional import optim
from train.state import Plan, State
from train.world.clock import Clock
from train.world.reduce import ExactTree

LEAVES = 4


def apart(gradient: Tensor) -> Tensor:
    """Return a gradient in an allocation of its own, as one process has it."""
    return gradient.clone()


def in_bucket(gradient: Tensor) -> Tensor:
    """Return a gradient 40 bytes into an allocation, as in a bucket after the 10 biases of the last layer."""
    room = torch.empty(gradient.numel() + 10, dtype=gradient.dtype, device=gradient.device)
    return room.as_strided(gradient.size(), gradient.stride(), 10).copy_(gradient)


def place_all(parameters: list[nn.Parameter], gradients: list[Tensor], place: Callable[[Tensor], Tensor]) -> None:
    """Give each parameter its gradient, at a place."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = place(gradient)


def outcome(state: State, gradients: list[Tensor], name: str, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return norms, clipped gradients and weights after three updates from gradients at a place."""
    parameters = [nn.Parameter(p.detach().clone()) for p in state.parameters]
    optimizer = optim.build(OptimConfig(name=name, lr=0.1), nn.ParameterList(parameters))
    found = []
    for _ in range(3):
        place_all(parameters, gradients, place)
        optim.align_gradients(parameters)
        found += [optim.grad_norm(parameters).clone(), nn.utils.clip_grad_norm_(parameters, 1.0).clone()]
        found += [p.grad.clone() for p in parameters if p.grad is not None]
        optimizer.step()
    return [*found, *parameters]


def alignment(lab: Lab, name: str) -> dict[str, Any]:
    """Check that norm, clipping and update have the same bits wherever a gradient is in memory."""
    with lab.open("--model.name cnn") as (_, state, _):
        gradients = [torch.randn_like(p) for p in state.parameters]
        alone, moved = (outcome(state, gradients, name, place) for place in (apart, in_bucket))
        return {"ok": all(torch.equal(a, b) for a, b in zip(alone, moved, strict=True))}


def unmended(lab: Lab) -> dict[str, Any]:
    """Count the norms whose bits change when gradients are misaligned: the reason for align_gradients."""
    with lab.open("--model.name cnn") as (_, state, _):
        gradients = [torch.randn_like(p) for p in state.parameters]
        alone, moved = (torch._foreach_norm([place(g) for g in gradients]) for place in (apart, in_bucket))
        differing = sum(not torch.equal(a, b) for a, b in zip(alone, moved, strict=True))
        return {"ok": None, "norms_that_differ": differing, "of": len(gradients)}


def alignment_checks(lab: Lab) -> list[Check]:
    """Return the checks of alignment."""
    mended: list[Check] = [(f"alignment, {name}", partial(alignment, lab, name)) for name in ("sgd", "adamw")]
    return [*mended, ("norms of misaligned gradients without the mend", partial(unmended, lab))]


class TwoRanks:
    """A world for ExactTree: this rank has all leaves, and the other one has none."""

    rank, world_size = 0, 2

    def __init__(self, device: torch.device) -> None:
        self.device, self.accelerator, self.clock = device, self, Clock()

    def no_sync(self, model: Any) -> Any:
        """Accumulate without communication, as Accelerator does."""
        return model.no_sync()


class SelfExchange(ExactTree):
    """An exact tree that sends its exchange to itself: the mean of what it sent and what came back is what it sent."""

    def _recursive_doubling(self, total: Tensor) -> Tensor:
        if total.is_cuda:  # gloo does not send to itself
            other = torch.empty_like(total)
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, total, 0), dist.P2POp(dist.irecv, other, 0)]):
                work.wait()
            total.add_(other).mul_(0.5)  # exact
        return total

    def _all_gather(self, rows: list[Tensor]) -> Tensor:
        assert len(rows) == 1, len(rows)
        return self._recursive_doubling(rows[0])


def all_leaves(plan: Plan, state: State, model: nn.Module, reducer: Any) -> list[Tensor]:
    """Return the gradients of a step."""
    size = len(plan.data.train) // 4 // LEAVES
    images = plan.data.train.images.float().to(memory_format=plan.memory_format) / 255
    for leaf in range(LEAVES):
        with reducer.one_pass(range(leaf, leaf + 1), range(LEAVES)):
            rows = slice(size * leaf, size * (leaf + 1))
            nn.functional.cross_entropy(model(images[rows]), plan.data.train.labels[rows]).backward()
    found = [p.grad.clone() for p in state.parameters if p.grad is not None]
    for parameter in state.parameters:
        parameter.grad = None
    return found


def hook(lab: Lab) -> dict[str, Any]:
    """Check that the tree under DDP, with the backend's stream, has the bits of one process."""
    store = dist.HashStore()
    dist.init_process_group("nccl" if lab.on_gpu else "gloo", store=store, rank=0, world_size=1)
    try:
        with lab.open(
            f"--model.name cnn --train.exact true --train.num_micro_batches {LEAVES} --train.cuda_graphs off"
        ) as (plan, state, _):
            alone = all_leaves(plan, state, state.module, plan.reducer)
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name since torch 2.13
            ddp = nn.parallel.DistributedDataParallel(
                state.module, gradient_as_bucket_view=True, broadcast_buffers=False
            )
            tree = SelfExchange(ddp, TwoRanks(plan.world.device), LEAVES, [range(LEAVES), range(0)])
            behind = [
                all_leaves(plan, state, ddp, tree) for _ in range(3)
            ]  # from the second on in DDP's rebuilt buckets
            same = [len(alone) == len(each) and all(map(torch.equal, alone, each)) for each in behind]
            return {"ok": all(same), "same_bits": same}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

"""Do what happens once, before the stopwatch starts: load libraries, plan, allocate, compile, record the step.

Invariant: the warm-up leaves no trace in the run. It makes steps on the real state and then puts that state back bit
for bit. No step is counted, and no example is entered in the ledger.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from train.errors import UserError, one_line
from train.evaluate import predict
from train.state import Plan, State
from train.step import train_step
from train.world import graphs

REFUSALS = {  # words of torch, and what to do about it
    "deterministic implementation": "Replace that layer, or pass --train.exact false.",
    "on the same device": "Make tensors on images.device, or register them as buffers.",
}


def warm_up(plan: Plan, state: State, notify: Callable[[str], None]) -> Callable[[Plan, State], None]:
    """Make a step, evaluate one batch, and put the state back; return `train_step`, or what replays its recording.

    If recording fails, warn through `notify`. Collective: every rank must call it.
    """
    if state.step == plan.total_steps:
        return train_step
    began, sampler, scaler = time.perf_counter(), plan.sampler, plan.world.accelerator.scaler
    take_step: Callable[[Plan, State], None] = train_step
    first = state.step
    before = {id(tensor): (tensor, tensor.clone()) for tensor in _tensors(state)}
    scale = scaler.state_dict() if scaler is not None else None
    plan.world.clock.step = first + 1
    plan.world.clock.enter("data")
    if not sampler.is_whole(first) and first + 1 < plan.total_steps:
        state.step += 1  # a whole batch: most are, and a recording repeats one size
    plan.tables.fill(state.step)
    for _ in range(graphs.CALLS_BEFORE if plan.should_record else 1):
        plan.tables.row_index.zero_()
        _first_step(plan, state)
    if plan.should_record and sampler.is_whole(state.step):
        try:
            take_step = _recorded(graphs.record(lambda: train_step(plan, state)))
        except RuntimeError as error:
            reason = one_line(error.__context__ or error)  # the end of the capture fails too, and says less
            notify(f"warning: the step cannot be recorded as a CUDA graph: {reason}. Training continues without.")
    plan.world.clock.enter("evaluate")
    for module in state.modules.values():
        module.eval()
        images = plan.data.test.images[: plan.config.eval.batch_size]
        predict(module, images, plan.data, plan.world, plan.memory_format)
    state.module.train()
    state.step = first
    put_back(state, before)
    if scaler is not None:
        scaler.load_state_dict(scale)
    plan.world.clock.enter("data")
    plan.tables.fill(first)
    plan.world.wait()
    plan.world.clock.forget()
    state.timing.warm_up_seconds = time.perf_counter() - began
    return take_step


def _first_step(plan: Plan, state: State) -> None:
    """Make a step. Raises UserError if the user's network fails, such as by an operation that this device refuses."""
    try:
        train_step(plan, state)
    except RuntimeError as error:
        if plan.world.clock.phase != "forward_backward" or not plan.sources:
            raise
        advice = [text for words, text in REFUSALS.items() if words in str(error)]
        place = f"model.name {plan.config.model.name} on {plan.world.device.type} in {plan.config.train.precision}"
        raise UserError(" ".join([f"{place}: {one_line(error, 120)}.", *advice])) from error


def _recorded(replay: Callable[[], object]) -> Callable[[Plan, State], None]:
    """Return a train_step that replays a recording where the batch is whole: a recording has one size."""

    def take_step(plan: Plan, state: State) -> None:
        if plan.sampler.is_whole(state.step):
            plan.world.clock.enter("forward_backward")
            replay()
        else:
            train_step(plan, state)

    return take_step


def _tensors(state: State) -> list[Tensor]:
    """Return all tensors that a step changes in place and a later step reads."""
    optimizer_state = [value for values in state.optimizer.optimizer.state.values() for value in values.values()]
    tensors = [tensor for module in state.modules.values() for tensor in module.state_dict(keep_vars=True).values()]
    return tensors + [value for value in optimizer_state if isinstance(value, Tensor)]


@torch.no_grad()
def put_back(state: State, before: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Restore the state: `before` maps the id of each tensor to it and its copy.

    Zero what the optimizer has made since.
    """
    state.optimizer.optimizer.zero_grad(set_to_none=True)
    for tensor in _tensors(state):
        if id(tensor) in before:
            tensor.copy_(before[id(tensor)][1])
        else:
            tensor.zero_()

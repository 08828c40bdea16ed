"""Do everything that happens once before the stopwatch starts: load libraries, plan, allocate, compile, record the step.

Invariant: the warm-up leaves no trace in the run. It makes steps on the real state and then puts that state back bit for
bit. No step is counted, and no example is entered in the ledger.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from train.evaluate import predict
from train.run import Run
from train.step import compute
from train.world import graphs


def state_tensors(run: Run) -> list[Tensor]:
    """Return all tensors that a step changes in place and a later step reads."""
    modules = [run.module, *([run.ema.model] if run.ema else [])]
    optimizer_state = [value for values in run.optimizer.optimizer.state.values() for value in values.values()]
    tensors = [tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()]
    return tensors + [value for value in optimizer_state if isinstance(value, Tensor)]


def warm_up(run: Run, notify: Callable[[str], None]) -> None:
    """Make a step, evaluate one batch, and record the step if the run should; then put the state back.

    If the recording fails, warn through `notify` and leave the run with ordinary steps. Collective: every rank must call it.
    """
    if run.step == run.total_steps:
        return
    began, sampler, scaler = time.perf_counter(), run.sampler, run.world.accelerator.scaler
    step = run.step if sampler.is_whole(run.step) or run.step + 1 == run.total_steps else run.step + 1
    before = {id(tensor): (tensor, tensor.clone()) for tensor in state_tensors(run)}
    scale = scaler.state_dict() if scaler is not None else None
    run.world.clock.step = run.step + 1
    run.world.clock.enter("data")
    run.tables.fill(step)
    for _ in range(graphs.CALLS_BEFORE if run.should_record else 1):
        run.tables.place.zero_()
        compute(run, step)
    if run.should_record and sampler.is_whole(step):
        try:
            run.replay = graphs.record(lambda: compute(run, step))
        except RuntimeError as error:
            reason = " ".join(str(error.__context__ or error).split())[
                :200
            ]  # the end of the capture fails too, and says less
            notify(
                f"warning: the step cannot be recorded as a CUDA graph: {reason}. Training continues with ordinary steps."
            )
    run.world.clock.enter("evaluate")
    for module in (run.module, *([run.ema.model] if run.ema else [])):
        module.eval()
        predict(module, run.data.test.images[: run.config.eval.batch_size], run.data, run.world, run.memory_format)
    run.module.train()
    put_back(run, before)
    if scaler is not None:
        scaler.load_state_dict(scale)
    run.world.clock.enter("data")
    run.tables.fill(run.step)
    run.world.wait()
    run.world.clock.forget()
    run.warm_up_seconds = time.perf_counter() - began


@torch.no_grad()
def put_back(run: Run, before: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Restore the state: `before` maps the id of each tensor to it and its copy. Zero what the optimizer has made since."""
    run.optimizer.optimizer.zero_grad(set_to_none=True)
    for tensor in state_tensors(run):
        if id(tensor) in before:
            tensor.copy_(before[id(tensor)][1])
        else:
            tensor.zero_()

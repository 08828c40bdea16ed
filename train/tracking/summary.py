"""What a run leaves at its end: its summary, samples to look at, and the lines that describe it."""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from train.errors import UserError
from train.evaluate import Result
from train.functional.trajectory import trajectory
from train.rundir import Row, RunDir, Summary
from train.state import Plan, State, why_not_recordable
from train.storage import checkpoint
from train.tracking import fingerprint
from train.world.clock import PHASES
from train.world.cores import why_slow
from train.world.environment import environment, git_commit, versions
from train.world.world import World

MAX_MISTAKES = 100
PACKAGES = ("torch", "torchvision", "accelerate", "wandb", "numpy", "safetensors")


def describe_batch(plan: Plan) -> str:
    """Return how a global batch is cut, in one line."""
    sampler, num_parts = plan.sampler, plan.sampler.num_micro_batches
    size, world_size = sampler.global_batch_size, plan.world.world_size
    return (
        f"{size} examples per step = {num_parts} micro-batch(es) of {size / num_parts:.4g}, on {world_size} rank(s); "
        f"{sampler.num_examples:,} examples = {sampler.steps_per_epoch} steps per epoch; {plan.total_steps} steps"
    )


def remarks(plan: Plan, argv: list[str]) -> Iterator[str]:
    """Yield what is unusual about a run, a line each."""
    config, world, size = plan.config, plan.world, plan.sampler.global_batch_size
    if size > plan.sampler.num_examples:
        yield f"warning: train.global_batch_size {size} exceeds the training split: each step is a whole epoch."
    if config.train.max_steps and any(arg.partition("=")[0] == "--train.epochs" for arg in argv):
        yield f"warning: train.epochs has no effect, because train.max_steps is {config.train.max_steps}."
    if config.train.exact and (found := environment(world)["variables"]):
        yield f"warning: other bits than without {', '.join(found)}, which choose other kernels."
    if world.device.type == "cpu" and (reason := why_slow(world.num_threads, world.local_world_size)):
        yield f"warning: training will be slow: {reason}."


def headline(plan: Plan, state: State, run_dir: Path, resumed_from: str | None) -> str:
    """Return which run this is and where it continues, in one line."""
    config, world = plan.config, plan.world
    origin = f"resumed from {resumed_from}" if resumed_from else "a new run"
    ranks = f"{world.world_size} process(es) on {world.device.type}"
    mode = config.train.precision + (", exact" if config.train.exact else "")
    if plan.should_record:
        mode += ", CUDA graph"
    elif config.train.cuda_graphs == "on":
        mode += f", no CUDA graph ({why_not_recordable(world)})"
    return f"{run_dir}: {origin}, step {state.step} of {plan.total_steps}, {ranks}, {mode}"


def summarize(plan: Plan, state: State, results: dict[str, Result], rows: list[Row], wall_seconds: float) -> Summary:
    """Build the summary; `results` are those of the last step. Collective: every rank must call it."""
    config, world, timing = plan.config, plan.world, state.timing
    speed = timing.images_per_second
    return Summary(
        outcome="finished" if state.step == plan.total_steps else "preempted",
        step=state.step,
        total_steps=plan.total_steps,
        world_size=world.world_size,
        split=plan.data.eval_split,
        num_examples=len(plan.data.test),
        results={name: result.evaluation() for name, result in results.items()},
        weights_sha256=checkpoint.tensors_sha256(state.module.state_dict()),
        ema_weights_sha256=checkpoint.tensors_sha256(state.ema.model.state_dict()) if state.ema else None,
        train_seconds=round(timing.train_seconds, 3),
        warm_up_seconds=round(timing.warm_up_seconds, 3),
        wall_seconds=round(wall_seconds, 3),
        images_per_second=round(speed, 1) if speed else None,
        best=state.best,
        skipped_steps=state.skipped_steps,
        ledger=state.closed_epoch,
        exact=config.train.exact,
        num_micro_batches=plan.sampler.num_micro_batches,
        precision=config.train.precision,
        device=world.device.type,
        data=plan.data.summary(),
        sha256=plan.sha256,
        config=trajectory(config),
        environment=environment(world),
        versions={"python": platform.python_version(), **versions(*PACKAGES, "lockstep")},
        git_commit=git_commit(),
        phases=phases(world),
        fingerprints=fingerprint.receipt(rows),
    )


def phases(world: World) -> dict[str, list[float]]:
    """Return the seconds of this attempt and each phase's share of them, by rank. Collective: every rank must call it.

    On the host's clock: what a GPU does counts in the phase in which the host waits for it, `log` on one and `reduce`
    on several.
    """
    table = torch.zeros(world.world_size, len(PHASES), dtype=torch.float64)
    world.clock.enter(world.clock.phase)
    table[world.rank] = torch.tensor(list(world.clock.seconds.values()))
    totals = world.all_reduce_sum_(table).sum(1)
    shares = (table / totals[:, None]).T.tolist()
    found = {name: [round(share, 4) for share in by_rank] for name, by_rank in zip(PHASES, shares, strict=True)}
    del found["failed"]
    return {"seconds": [round(total, 3) for total in totals.tolist()], **found}


def read_finished(run_dir: RunDir, plan: Plan, state: State) -> Summary | None:
    """Return the summary of a run that has nothing left to do, or None. Collective: every rank must call it."""
    summary = None
    if plan.world.is_main and state.step == plan.total_steps:
        with contextlib.suppress(UserError):  # damaged: it is written again
            summary = run_dir.read_summary()
    is_finished = summary is not None and (summary.outcome, summary.step) == ("finished", state.step)
    text = plan.world.broadcast(summary.to_json() if summary and is_finished else None)
    return Summary.from_json(text) if text else None


def collect_samples(plan: Plan, state: State, results: dict[str, Result]) -> dict[str, Tensor]:
    """Return CPU tensors of the last of `results`: K mistakes, the most confident first, and the first convolution.

    `mistakes_images` uint8 [K,C,H,W]; `mistakes_labels`, `mistakes_predictions`, `mistakes_positions` (in the evaluated
    split) int64 [K]; `mistakes_confidences` float32 [K], 0..1. `filters` float32 [F,h,w], averaged over the channels,
    only if the network has a two-dimensional convolution. A host-device sync.
    """
    result, labels = list(results.values())[-1], plan.data.test.labels.cpu()
    wrong = (result.predictions != labels).nonzero().squeeze(1)
    order = result.confidences[wrong].argsort(descending=True, stable=True)
    at = wrong[order[:MAX_MISTAKES]]
    modules = list(state.modules.values())[-1].modules()
    filters = [layer.weight.detach().mean(1).cpu() for layer in modules if isinstance(layer, nn.Conv2d)][:1]
    return {
        "mistakes_images": plan.data.test.images[at.to(plan.world.device)].cpu().contiguous(),
        "mistakes_labels": labels[at],
        "mistakes_predictions": result.predictions[at],
        "mistakes_confidences": result.confidences[at],
        "mistakes_positions": at,
        **({"filters": filters[0].contiguous()} if filters else {}),
    }

"""What a run says of itself: how a batch is cut, and the contents of summary.json."""

import contextlib
import platform
import subprocess
from pathlib import Path

import torch

from train.errors import UserError
from train.evaluate import Result
from train.mathematics import mathematics
from train.rundir import Row, RunDir, Summary
from train.state import Plan, State, why_not_recordable
from train.storage import checkpoint
from train.tracking import fingerprint
from train.world.clock import PHASES
from train.world.environment import environment, versions
from train.world.world import World

PACKAGES = ("torch", "torchvision", "accelerate", "wandb", "numpy", "safetensors")


def describe_batch(plan: Plan) -> str:
    """Return how a global batch is cut, in one line."""
    sampler, world_size = plan.sampler, plan.world.world_size
    size, num_parts = sampler.global_batch_size, sampler.micro_batches
    first, last = sampler.micro_batch(0, 0)
    if num_parts % world_size == 0 and size % num_parts == 0:
        cut = f"{world_size} rank(s) x {num_parts // world_size} micro-batch(es) x {last - first} examples"
    else:
        cut = f"{num_parts} micro-batches of about {size / num_parts:.0f} examples, shared by {world_size} ranks"
    return (
        f"{size} examples per step = {cut}; {sampler.num_examples:,} examples = {sampler.steps_per_epoch} steps per epoch; "
        f"{plan.total_steps} steps"
    )


def headline(plan: Plan, state: State, run_dir: Path, resumed_from: str | None) -> str:
    """Return which run this is and where it continues, in one line."""
    config, world = plan.config, plan.world
    origin = f"resumed from {resumed_from}" if resumed_from else "a new run"
    recording = ", CUDA graph" if plan.should_record else ""
    if config.train.cuda_graphs == "on" and not plan.should_record:
        recording = f", no CUDA graph ({why_not_recordable(world)})"
    mode = f"{config.train.precision}{', exact' if config.train.exact else ''}{recording}"
    ranks = f"{world.world_size} process(es) on {world.device.type}"
    return f"{run_dir}: {origin}, step {state.step} of {plan.total_steps}, {ranks}, {mode}"


def git_commit() -> str | None:
    """The commit of the code that runs, with `+` if files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(Path(__file__).parent), *arguments), capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()  # fmt: skip

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


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
        num_micro_batches=plan.sampler.micro_batches,
        precision=config.train.precision,
        device=world.device.type,
        data=plan.data.summary(),
        config=mathematics(config),
        environment=environment(world),
        versions={"python": platform.python_version(), **versions(*PACKAGES, "lockstep")},
        git_commit=git_commit(),
        phases=phases(world),
        fingerprints=fingerprint.receipt(rows),
    )


def phases(world: World) -> dict[str, list[float]]:
    """Where the time of this life went: seconds, and each phase's share of them, by rank. Collective: every rank must call it.

    On the host's clock: what a GPU does counts in the phase in which the host waits for it, `log` on one and `reduce` on several.
    """
    table = torch.zeros(world.world_size, len(PHASES), dtype=torch.float64)
    world.clock.enter(world.clock.phase)
    table[world.rank] = torch.tensor(list(world.clock.seconds.values()))
    world.all_reduce_sum_(table)
    totals = table.sum(1)
    shares = (table / totals[:, None]).T.tolist()
    named = {
        name: [round(share, 4) for share in shares[place]] for place, name in enumerate(PHASES) if name != "failed"
    }
    return {"seconds": [round(total, 3) for total in totals.tolist()], **named}


def read_finished(run_dir: RunDir, plan: Plan, state: State) -> Summary | None:
    """Return the summary of a run that has nothing left to do, or None. Collective: every rank must call it."""
    summary = None
    if plan.world.is_main and state.step == plan.total_steps:
        with contextlib.suppress(UserError):  # damaged: it is written again
            summary = run_dir.read_summary()
        if summary and (summary.outcome, summary.step) != ("finished", state.step):
            summary = None
    text = plan.world.broadcast(summary.to_json() if summary else None)
    return Summary.from_json(text) if text else None

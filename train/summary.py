"""What a run says of itself: how a batch is cut, and the contents of summary.json."""

import platform
import subprocess
from pathlib import Path

import torch

from train.errors import UserError
from train.evaluate import Result
from train.mathematics import mathematics
from train.run import Run, contract, unrecordable
from train.rundir import Row, RunDir, Summary
from train.storage import checkpoint
from train.tracking import fingerprint
from train.world.clock import PHASES
from train.world.versions import versions
from train.world.world import World

PACKAGES = ("torch", "torchvision", "accelerate", "wandb", "numpy", "safetensors")


def arithmetic(run: Run) -> str:
    """How a global batch is cut, in one line."""
    sampler, world_size = run.sampler, run.world.world_size
    size, parts = sampler.global_batch_size, sampler.micro_batches
    first, last = sampler.micro_batch(0, 0)
    if parts % world_size == 0 and size % parts == 0:
        cut = f"{world_size} rank(s) x {parts // world_size} micro-batch(es) x {last - first} examples"
    else:
        cut = f"{parts} micro-batches of about {size / parts:.0f} examples, shared by {world_size} ranks"
    return (
        f"{size} examples per step = {cut}; {sampler.num_examples:,} examples = {sampler.steps_per_epoch} steps per epoch; "
        f"{run.total_steps} steps"
    )


def headline(run: Run, run_dir: Path, resumed_from: str | None) -> str:
    """Which run this is and where it goes on, in one line."""
    origin = f"resumed from {resumed_from}" if resumed_from else "a new run"
    recording = ", CUDA graph" if run.should_record else ""
    if run.config.train.cuda_graphs == "on" and not run.should_record:
        recording = f", no CUDA graph ({unrecordable(run.world)})"
    mode = f"{run.config.train.precision}{', exact' if run.config.train.exact else ''}{recording}"
    ranks = f"{run.world.world_size} process(es) on {run.world.device.type}"
    return f"{run_dir}: {origin}, step {run.step} of {run.total_steps}, {ranks}, {mode}"


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


def summarize(run: Run, outcome: str, results: dict[str, Result], wall_seconds: float, rows: list[Row]) -> Summary:
    """Build the summary from the state, the last evaluation and the rows. Collective: every rank must call it."""
    return Summary(
        outcome=outcome,
        step=run.step,
        total_steps=run.total_steps,
        world_size=run.world.world_size,
        split=run.data.eval_split,
        num_examples=len(run.data.test),
        results={name: result.evaluation() for name, result in results.items()},
        weights_sha256=checkpoint.tensors_sha256(run.module.state_dict()),
        ema_weights_sha256=checkpoint.tensors_sha256(run.ema.model.state_dict()) if run.ema else None,
        train_seconds=round(run.train_seconds, 3),
        warm_up_seconds=round(run.warm_up_seconds, 3),
        wall_seconds=round(wall_seconds, 3),
        images_per_second=round(run.life_examples / run.life_seconds, 1) if run.life_seconds else None,
        best=run.best,
        skipped_steps=run.skips,
        ledger=run.closed_epoch,
        exact=run.config.train.exact,
        num_micro_batches=run.sampler.micro_batches,
        precision=run.config.train.precision,
        device=run.world.device.type,
        data=run.data.summary(),
        config=mathematics(run.config),
        environment=contract(run.world),
        versions={"python": platform.python_version(), **versions(*PACKAGES, "lockstep")},
        git_commit=git_commit(),
        phases=phases(run.world),
        fingerprints=fingerprint.receipt(rows),
    )


def phases(world: World) -> dict[str, list[float]]:
    """Where the time of this life went: seconds, and each phase's share of them, by rank. Collective: every rank must call it.

    On the host's clock: what a GPU does counts in the phase in which the host waits for it, `log` on one and `reduce` on several.
    """
    table = torch.zeros(world.world_size, len(PHASES), dtype=torch.float64)
    world.clock.enter(world.clock.phase)
    table[world.rank] = torch.tensor(list(world.clock.seconds.values()))
    world.sum_(table)
    totals = table.sum(1)
    shares = (table / totals[:, None]).T.tolist()
    named = {
        name: [round(share, 4) for share in shares[place]] for place, name in enumerate(PHASES) if name != "failed"
    }
    return {"seconds": [round(total, 3) for total in totals.tolist()], **named}


def read_finished(run_dir: RunDir, run: Run) -> Summary | None:
    """Return the summary of a run that has nothing left to do; None on other ranks than 0."""
    if not run.world.is_main or run.step < run.total_steps:
        return None
    try:
        summary = run_dir.read_summary()
    except UserError:  # damaged: it is written again
        return None
    return summary if summary and summary.outcome == "finished" and summary.step == run.step else None

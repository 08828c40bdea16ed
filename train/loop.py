"""The order of things: set up, resume, step, log, evaluate, save, leave. Everything else is in the other modules.

`step` counts finished updates and is the only clock. Nothing here decides what a step computes (step.py).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import safetensors.torch

from train.cli import to_yaml
from train.config import Config
from train.errors import RunError, UserError
from train.evaluate import Result, evaluate
from train.functional.sampler import expected_coverage
from train.rundir import Row, RunDir, Summary
from train.state import Ledger, Plan, State, restore, set_up, snapshot
from train.step import prepare_step
from train.storage import checkpoint, data
from train.storage.lease import Lease
from train.tracking.alarms import Alarms
from train.tracking.journal import Journal
from train.tracking.metrics import Metrics
from train.tracking.summary import collect_samples, describe_batch, headline, read_finished, remarks, summarize
from train.tracking.tracer import Tracer
from train.warmup import warm_up
from train.world import signals
from train.world.launcher import is_restart
from train.world.watchdog import Watchdog
from train.world.world import World

T = TypeVar("T")


def train(config: Config, world: World, run_dir: RunDir, argv: list[str]) -> Summary:
    """Train to the end, or until a signal asks for a stop; return the summary. Collective: every rank must call it.

    Raises UserError for bad config or data, RuntimeError for failures on the way.
    """
    began = time.perf_counter()
    with world.raising_together():
        lease = Lease(run_dir.path, is_main=world.is_main)
    with (
        lease,
        Metrics(config.log, config.wandb, run_dir, is_main=world.is_main) as metrics,
        Watchdog(world.clock, run_dir.heartbeats, world.rank, world.world_size),  # not for a run that the lease refused
    ):
        plan, state, rows = open_run(config, world, lease, metrics, argv)
        if finished := read_finished(run_dir, plan, state):
            metrics.say("This run is finished; nothing to do.")
            return finished
        take_step = warm_up(plan, state, metrics.say)
        world.clock.limit = config.train.timeout
        journal = Journal(plan, state, metrics, Alarms(config.log, metrics, rows))
        tracer = Tracer(config.train, lease, is_main=world.is_main)
        results: dict[str, Result] = {}
        stop_requested = False
        while state.step < plan.total_steps and not stop_requested:
            if tracer.should_start(state.step):
                with journal.paused():
                    tracer.start()
            prepare_step(plan, state)
            take_step(plan, state)
            state.step += 1
            world.clock.enter("log")
            should_sync = plan.should_sync(state.step) or tracer.should_stop(state.step)
            stop_requested = journal.collect(should_log=plan.should_log(state.step), should_sync=should_sync)
            if tracer.should_stop(state.step, is_last=stop_requested or state.step == plan.total_steps):
                with journal.paused():
                    metrics.say(tracer.write(state.step))
            if should_sync or stop_requested:
                with journal.paused():
                    results = finish_step(plan, state, lease, metrics, journal, stop_requested=stop_requested)
        return close_run(plan, state, lease, metrics, results, began)


def open_run(
    config: Config, world: World, lease: Lease, metrics: Metrics, argv: list[str]
) -> tuple[Plan, State, list[Row]]:
    """Load the data, build the run, resume it and open its records; return also the rows of earlier attempts.

    Collective: every rank must call it.
    """
    source = data.load(config.data, world, metrics.say)
    plan, state = set_up(config, world, source)
    found = find_checkpoint(config.run.resume, lease.checkpoints, metrics, world)
    resumed_from = found[0] if found else None
    warnings = restore(plan, state, found[1], found[0]) if found else []

    def open_records() -> list[Row]:
        lease.write(lease.run_dir.config, to_yaml(config).encode())
        for name, content in plan.sources.items():
            (lease.run_dir.network / name).parent.mkdir(parents=True, exist_ok=True)
            lease.write(lease.run_dir.network / name, content)
        with lease.writing() as staging:
            return metrics.open(state.step, plan.total_steps, staging)

    rows = on_main_rank(world, lease.run_dir.path, UserError, open_records) or []
    signals.announce(metrics.say)
    signals.defer()
    seconds = [row["train_seconds"] for row in rows if row["event"] == "train" and "train_seconds" in row]
    state.timing.train_seconds = seconds[-1] if seconds else 0.0
    if world.is_main:
        warnings += remarks(plan, argv)
        for line in (headline(plan, state, lease.run_dir.path, resumed_from), describe_batch(plan), *warnings):
            metrics.say(line)
    metrics.record(
        "start",
        state.step,
        command=argv,
        world_size=world.world_size,
        data=source.summary(),
        sha256=plan.sha256,
        resumed_from=resumed_from,
        total_steps=plan.total_steps,
    )
    return plan, state, rows


def finish_step(
    plan: Plan, state: State, lease: Lease, metrics: Metrics, journal: Journal, *, stop_requested: bool
) -> dict[str, Result]:
    """Close the epoch, evaluate and save, whatever is due after a step. Collective: every rank must call it."""
    if plan.is_epoch_end(state.step):
        close_epoch(plan, state)
    results: dict[str, Result] = {}
    is_best = False
    if plan.should_evaluate(state.step):
        plan.world.clock.enter("evaluate")
        results = evaluate_all(plan, state)
        for name, result in results.items():
            metrics.record("eval", state.step, split=plan.data.eval_split, ema=name == "ema", **result.record())
        metrics.record_weights(state.step, state.module)
        accuracy = list(results.values())[-1].accuracy
        is_best = state.best is None or accuracy > state.best["accuracy"]
        if is_best:
            state.best = {"step": state.step, "accuracy": accuracy}
    if is_best or stop_requested or plan.should_save(state.step):
        is_required = stop_requested or state.step == plan.total_steps
        save(plan, state, lease, metrics, journal, is_required=is_required)
    return results


def close_run(
    plan: Plan, state: State, lease: Lease, metrics: Metrics, results: dict[str, Result], began: float
) -> Summary:
    """Write the summary of a run that is finished or preempted, and return it. Collective: every rank must call it."""
    world, run_dir = plan.world, lease.run_dir
    is_finished = state.step == plan.total_steps
    if not is_finished:
        metrics.record("preempted", state.step, signal=signals.requested() or "a signal to another rank")
    world.clock.enter("finish")
    if is_finished and not results:  # killed between the last save and the summary
        results = evaluate_all(plan, state)
    results = results if is_finished else {}
    rows = on_main_rank(world, run_dir.path, RunError, run_dir.read_rows) or []
    summary = summarize(plan, state, results, rows, time.perf_counter() - began)

    def write() -> None:
        if results:  # first: next to a current summary they are of the same step
            lease.write(run_dir.samples, safetensors.torch.save(collect_samples(plan, state, results)))
        lease.write(run_dir.summary, summary.to_json().encode())

    # No rank leaves while rank 0 still writes: a launcher would kill it.
    on_main_rank(world, run_dir.path, RunError, write)
    return summary


def evaluate_all(plan: Plan, state: State) -> dict[str, Result]:
    """Evaluate the weights and, if they are averaged, their average. Collective: every rank must call it."""
    options = (plan.data, plan.config.eval.batch_size, plan.world, plan.memory_format)
    return {name: evaluate(module, *options) for name, module in state.modules.items()}


def close_epoch(plan: Plan, state: State) -> None:
    """Check that the epoch that ends used each example exactly once. Collective: every rank must call it."""
    expected, found = expected_coverage(plan.sampler.num_examples, 1 << 20), state.ledger.reduced(plan.world)
    if found != expected:
        raise RuntimeError(
            f"The sample ledger of the epoch that ended at step {state.step} has {found[1]} examples with sum "
            f"{found[0]:016x}, expected {expected[1]} with {expected[0]:016x}: an example was used twice or never. "
            "No checkpoint was saved."
        )
    state.ledger = Ledger()
    state.closed_epoch = {"step": state.step, "sum": f"{found[0]:016x}", "count": found[1]}


def save(plan: Plan, state: State, lease: Lease, metrics: Metrics, journal: Journal, *, is_required: bool) -> None:
    """Write a checkpoint of the current step and prune old ones. Collective: every rank must call it.

    A failed write skips this checkpoint. With `is_required` (the last step, or a stop) it raises RunError instead. The
    rows come first: a resume keeps the rows up to its checkpoint's step.
    """
    plan.world.clock.enter("save")
    journal.record_fingerprints()
    saved = snapshot(plan, state)

    def write() -> None:
        metrics.record("saved", state.step, weights_sha256=checkpoint.tensors_sha256(saved.model))
        try:
            metrics.sync()
            needed = {state.step, state.best["step"] if state.best else state.step}
            with lease.writing() as staging:
                checkpoint.write(lease.checkpoints, state.step, checkpoint.encode(saved), staging)
                checkpoint.prune(lease.checkpoints, plan.config.checkpoint.keep, needed, staging)
        except OSError as error:
            metrics.record("save_failed", state.step, error=str(error.strerror))
            raise

    if is_required:
        on_main_rank(plan.world, lease.checkpoints, RunError, write)
    elif plan.world.is_main:
        try:
            write()
        except OSError as error:
            where = f"{error.strerror} ({lease.checkpoints})"
            metrics.say(f"warning: no checkpoint of step {state.step}: {where}. Training continues.")


def find_checkpoint(
    resume: str, checkpoints: Path, metrics: Metrics, world: World
) -> tuple[str, checkpoint.Snapshot] | None:
    """Return the path and the content of the checkpoint to continue from, or None.

    Collective: every rank must call it.
    """
    found: tuple[Path, checkpoint.Files] | None = None
    # A restart has its launcher's arguments, but continues from what its earlier attempts have saved.
    resume = "auto" if is_restart() and checkpoint.directories(checkpoints) else resume
    with world.raising_together():
        if world.is_main and resume == "auto":
            found = checkpoint.latest(checkpoints, metrics.say)
            if found is None and RunDir(checkpoints.parent).summary.exists():
                raise UserError(
                    f"{checkpoints.parent} holds a run whose checkpoints are gone. It would be overwritten. "
                    "Put them back, or use another run.name."
                )
        elif world.is_main and resume != "never":
            found = Path(resume), checkpoint.read(Path(resume))
        elif world.is_main and (checkpoint.directories(checkpoints) or RunDir(checkpoints.parent).summary.exists()):
            raise UserError(f"{checkpoints.parent} holds a run, and run.resume is never. Use another run.name.")
    source = world.broadcast(str(found[0]) if found else None)
    files = found[1] if found else {}
    received = {name: world.broadcast_bytes(files.get(name, b"")) for name in world.broadcast(list(files))}
    return (source, checkpoint.decode(received)) if source else None


def on_main_rank(world: World, place: Path, kind: type[UserError | RunError], action: Callable[[], T]) -> T | None:
    """Run `action`, which reads and writes in `place`, on rank 0. If the disk refuses, raise `kind` on every rank.

    Collective: every rank must call it.
    """
    result = None
    with world.raising_together():
        try:
            result = action() if world.is_main else None
        except UserError as problem:  # a file that cannot be read
            raise kind(str(problem)) from problem
        except OSError as problem:
            raise kind(
                f"{problem.filename or place} cannot be written: {problem.strerror}. Nothing was deleted."
            ) from problem
    return result

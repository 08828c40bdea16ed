"""The order of things: set up, resume, step, log, evaluate, save, leave. Everything else lives in the other modules.

Invariant: what a step computes is a function of (config, step) and the state after the step before; the clock, the log and
the world size never enter it. `step` counts finished updates and is the only clock.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch

from train import samples
from train.config import Config
from train.errors import RunError, UserError
from train.evaluate import Result, evaluate
from train.functional.sampler import expected_ledger
from train.journal import Journal
from train.run import Ledger, Run, is_due, make_state, restore, set_up
from train.rundir import RunDir, Summary
from train.step import train_step
from train.storage import checkpoint, data
from train.storage.lease import Lease
from train.summary import arithmetic, headline, read_finished, summarize
from train.tracking.alarms import Alarms
from train.tracking.metrics import Metrics
from train.tracking.tracer import Tracer
from train.warmup import warm_up
from train.world import signals
from train.world.watchdog import Watchdog
from train.world.world import World, is_restart

T = TypeVar("T")


def evaluate_run(run: Run) -> dict[str, Result]:
    """Evaluate the weights and, if they are averaged, their average. Collective: every rank must call it."""
    modules = {"raw": run.module} | ({"ema": run.ema.model} if run.ema else {})
    options = (run.data, run.config.eval.batch_size, run.world, run.memory_format)
    return {name: evaluate(module, *options) for name, module in modules.items()}


def close_epoch(run: Run) -> None:
    """Check at an epoch's end that it used each example exactly once. Collective: every rank must call it."""
    if run.step % run.sampler.steps_per_epoch:
        return
    num_examples = run.sampler.num_examples
    expected, found = expected_ledger(num_examples, 1 << 20), run.ledger.reduced(run.world)
    if found != expected:
        raise RuntimeError(
            f"The sample ledger of the epoch that ended at step {run.step} has {found[1]} examples with sum {found[0]:016x}, "
            f"expected {expected[1]} with {expected[0]:016x}: an example was used twice or never. No checkpoint was saved."
        )
    run.ledger, run.closed_epoch = Ledger(), {"step": run.step, "sum": f"{found[0]:016x}", "count": found[1]}


def main_writes(world: World, place: Path, kind: type[UserError | RunError], action: Callable[[], T]) -> T | None:
    """Let rank 0 write in `place`; raise `kind` on every rank if the disk refuses. Collective: every rank must call it."""
    result, error = None, None
    if world.is_main:
        try:
            result = action()
        except OSError as problem:
            error = kind(f"{problem.filename or place} cannot be written: {problem.strerror}. Nothing was deleted.")
    world.agree(error)
    return result


def take_lease(run_dir: Path, world: World) -> Lease:
    """Be the only one that writes into the run directory, or raise UserError. Collective: every rank must call it."""
    lease, error = None, None
    try:
        lease = Lease(run_dir, is_main=world.is_main)
    except UserError as problem:
        error = problem
    world.agree(error)
    assert lease is not None
    return lease


def save(run: Run, lease: Lease, metrics: Metrics, journal: Journal, *, required: bool) -> None:
    """Write a checkpoint of the current step and prune old ones. Collective: every rank must call it.

    The rows come first: a resume keeps the rows up to its checkpoint's step, so whole stretches must end there. A disk that
    fails costs this checkpoint, not the run; with `required` (the last step, or a signal) it raises RunError.
    """
    run.world.clock.enter("save")
    journal.record_fingerprints()
    state = make_state(run)

    def write() -> None:
        metrics.record("saved", run.step, weights_sha256=checkpoint.tensors_sha256(state.model))
        try:
            metrics.sync()
            needed = {run.step, run.best["step"] if run.best else run.step}
            with lease.writing() as staging:
                checkpoint.write(lease.checkpoints, run.step, checkpoint.encode(state), staging)
                checkpoint.prune(lease.checkpoints, run.config.checkpoint.keep, needed, staging)
        except OSError as error:
            metrics.record("save_failed", run.step, error=str(error.strerror))
            raise

    if required:
        main_writes(run.world, lease.checkpoints, RunError, write)
    elif run.world.is_main:
        try:
            write()
        except OSError as error:
            metrics.say(
                f"warning: no checkpoint of step {run.step}: {error.strerror} ({lease.checkpoints}). Training goes on."
            )


def find_checkpoint(
    config: Config, checkpoints: Path, metrics: Metrics, world: World
) -> tuple[str, checkpoint.State] | None:
    """Return (its path, its state) of the checkpoint to go on from, or None. Collective: every rank must call it."""
    found: tuple[Path, checkpoint.Files] | None = None
    error = None
    # A restart has its launcher's arguments, but goes on from what its earlier lives have saved.
    resume = "auto" if is_restart() and checkpoint.directories(checkpoints) else config.run.resume
    if world.is_main:
        try:
            if resume == "auto":
                found = checkpoint.latest(checkpoints, metrics.say)
            elif resume == "never":
                if checkpoint.directories(checkpoints):
                    raise UserError(f"{checkpoints.parent} holds a run, and run.resume is never. Use another run.name.")
            else:
                path = Path(resume)
                found = path, checkpoint.read(path)
        except UserError as problem:
            error = problem
    world.agree(error)
    source = world.broadcast(str(found[0]) if found else None)
    files = found[1] if found else {}
    received = {name: world.broadcast_bytes(files.get(name, b"")) for name in world.broadcast(list(files))}
    return (source, checkpoint.decode(received)) if source else None


def finish_step(
    run: Run, metrics: Metrics, lease: Lease, journal: Journal, *, stop_requested: bool
) -> dict[str, Result] | None:
    """Evaluate and save if that is due after the step that just ended. Collective: every rank must call it."""
    close_epoch(run)
    results, improved = None, False
    if is_due(run, run.config.eval.every_steps, run.step):
        run.world.clock.enter("evaluate")
        results = evaluate_run(run)
        for name, result in results.items():
            metrics.record("eval", run.step, split=run.data.eval_split, ema=name == "ema", **result.record())
        metrics.record_weights(run.step, run.module)
        accuracy = list(results.values())[-1].accuracy
        improved = run.best is None or accuracy > run.best["accuracy"]
        if improved:
            run.best = {"step": run.step, "accuracy": accuracy}
    if improved or stop_requested or is_due(run, run.config.checkpoint.every_steps, run.step):
        save(run, lease, metrics, journal, required=stop_requested or run.step == run.total_steps)
    return results


def train(config: Config, world: World, run_dir: Path, argv: list[str]) -> tuple[str, Summary]:
    """Train to the end or until told to leave -> (outcome: finished | preempted, the summary).

    Collective: every rank must call it. Raises UserError for bad config or data, RuntimeError for what fails on the way.
    """
    began = time.perf_counter()
    with (
        take_lease(run_dir, world) as lease,
        Metrics(config, run_dir, is_main=world.is_main, total_steps=0) as metrics,
        Watchdog(
            world.clock, run_dir / ".ranks", world.rank, world.world_size
        ),  # a second run, refused above, has none
    ):
        source = data.load(config.data, world, metrics.say)
        run = set_up(config, world, source)
        metrics.total_steps = run.total_steps
        found = find_checkpoint(config, lease.checkpoints, metrics, world)
        warnings = restore(run, found[1], found[0]) if found else []
        rows = main_writes(world, run_dir, UserError, lambda: open_records(run, lease, metrics)) or []
        kept = [row["train_seconds"] for row in rows if row["event"] == "train" and "train_seconds" in row]
        run.train_seconds = kept[-1] if kept else 0.0
        for line in (headline(run, run_dir, found[0] if found else None), arithmetic(run), *warnings):
            metrics.say(line)
        facts = {"world_size": world.world_size, "data": source.summary(), "resumed_from": found[0] if found else None}
        facts |= {"total_steps": run.total_steps}
        metrics.record("start", run.step, command=argv, **facts)
        finished = read_finished(RunDir(run_dir), run)
        if text := world.broadcast(finished.to_json() if finished else None):
            metrics.say("This run is finished; nothing to do.")
            return "finished", Summary.from_json(text)
        warm_up(run, metrics.say)
        world.set_timeout(config.train.timeout)
        outcome, results = run_steps(run, metrics, lease, Alarms(config.log, metrics, rows))
        world.clock.enter("finish")
        if outcome == "finished" and results is None:  # killed between the last save and the summary
            results = evaluate_run(run)
        summary = summarize(
            run,
            outcome,
            results or {},
            time.perf_counter() - began,
            RunDir(run_dir).read_rows() if world.is_main else [],
        )
        # Nobody leaves while rank 0 still writes: a launcher would kill it.
        main_writes(world, run_dir, RunError, lambda: write_results(run, lease, results, summary))
        return outcome, summary


def open_records(run: Run, lease: Lease, metrics: Metrics) -> list[dict[str, Any]]:
    """Write config.yaml and open metrics.jsonl on rank 0; return the rows of the lives before."""
    lease.write(metrics.path.with_name("config.yaml"), run.config.to_yaml().encode())
    with lease.writing() as staging:
        return metrics.open(run.step, staging)


def write_results(run: Run, lease: Lease, results: dict[str, Result] | None, summary: Summary) -> None:
    """Write summary.json on rank 0, and before it the samples: beside a current summary they are of the same step."""
    if results:
        lease.write(RunDir(lease.run_dir).samples, safetensors.torch.save(samples.collect(run, results)))
    lease.write(RunDir(lease.run_dir).summary, summary.to_json().encode())


def run_steps(run: Run, metrics: Metrics, lease: Lease, alarms: Alarms) -> tuple[str, dict[str, Result] | None]:
    """Step until the end, or until a signal has reached any rank -> (outcome, results of the last step's evaluation)."""
    results, config, clock = None, run.config, run.world.clock
    journal, tracer = Journal(run, metrics, alarms), Tracer(config.train, lease, is_main=run.world.is_main)
    always_syncs = not run.world.runs_ahead  # on a GPU only steps that must wait do
    while run.step < run.total_steps:
        if tracer.wants(run.step):
            journal.pause()
            tracer.start(run.step)
            journal.resume()
        train_step(run)
        clock.enter("log")
        should_log = is_due(run, config.log.every_steps, run.step)
        should_sync = is_due(run, config.eval.every_steps, run.step) or is_due(
            run, config.checkpoint.every_steps, run.step
        )
        should_sync |= (
            run.step == run.tables.stop
        )  # of the stretch, and of an epoch: the next step overwrites its numbers
        stop_requested = False
        if should_log or should_sync or always_syncs:
            stop_requested = journal.collect(should_log=should_log, wait=should_sync or always_syncs)
        if tracer.ends(run.step, stop_requested or run.step == run.total_steps):
            stop_requested |= journal.pause()
            metrics.say(tracer.write(run.step))
            journal.resume()
        if should_sync or stop_requested:
            journal.pause()
            results = finish_step(run, metrics, lease, journal, stop_requested=stop_requested)
            journal.resume()
        if stop_requested and run.step < run.total_steps:
            metrics.record("preempted", run.step, signal=signals.requested() or "a signal to another rank")
            return "preempted", None
    return "finished", results

"""The order of things: set up, resume, step, log, evaluate, save, leave. Everything else lives in the other modules.

Invariant: what a step computes is a function of (config, step) and the state after the step before; the clock, the log and
the world size never enter it. `step` counts finished updates and is the only clock.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train import checkpoint, data, exhibits, fingerprint, models, optim, preempt, rng
from train.augment import augment
from train.config import Config, UserError
from train.evaluate import Result, evaluate
from train.metrics import Metrics, read_rows
from train.run import Ledger, Run, is_due, make_state, restore, set_up
from train.sampler import Sampler, expected_ledger, key
from train.summary import arithmetic, headline, read_finished, summarize, write_json
from train.world import World


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, on the device: reading it synchronizes."""

    loss: Tensor
    grad_norm: Tensor | None
    stops: Tensor  # how many ranks were told to leave
    lr: float


def train_step(run: Run) -> StepResult:
    """Make one update from the global batch of `run.step`. Collective: every rank must call it.

    On the CPU a loss that is not finite raises RuntimeError before the update; on a GPU the caller looks when it logs.
    """
    config, world, sampler, step = run.config, run.world, run.sampler, run.step
    num_examples = sampler.batch_rows(step)
    norms = models.norms(run.module)
    width = 1 + 2 * sum(norm.num_features for norm in norms)
    # One row per micro-batch: loss_sum, then each norm's mean and variance; the last row holds the ranks' stop flags.
    # A rank fills its own rows; zeros elsewhere add up exactly, so the sum has the same bits on any world size.
    table = torch.zeros(sampler.micro_batches + 1, width, dtype=torch.float64, device=world.device)
    own = sampler.own_micro_batches(world.rank, world.world_size)
    for index in own:
        with run.reducer.micro_batch(index, own):
            loss_sum = _micro_batch_loss(run, index)
            world.accelerator.backward(loss_sum * (run.reducer.loss_scale / num_examples))
        statistics = [values for norm in norms for values in (norm.batch_mean, norm.batch_var)]
        table[index] = torch.cat([loss_sum.detach().view(1), *statistics]).double()
    table[-1, 0] = float(preempt.requested() is not None)
    world.sum_(table)
    loss = table[:-1, 0].sum() / num_examples
    if world.device.type == "cpu":
        check_loss(float(loss), step)
    _merge_statistics(norms, table[:-1, 1:], sampler, step)
    grad_norm = _clip(run)
    lr = optim.lr(config.optim, step, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.update(run.module)
    run.step += 1
    run.life_examples += num_examples
    if config.train.exact and grad_norm is not None:
        run.fingerprints.append((loss, grad_norm))
    return StepResult(loss, grad_norm, table[-1, 0], lr)


def _micro_batch_loss(run: Run, index: int) -> Tensor:
    """Return the summed loss, float32 [], over micro-batch `index` of the current step, and enter it in the ledger."""
    config, device, source = run.config, run.world.device, run.data
    start, stop = run.sampler.micro_batch(run.step, index)
    is_empty = start == stop  # a last batch of fewer examples than micro-batches: one example that weighs nothing
    examples = run.sampler.examples(run.step, start, stop)
    run.ledger.add(examples)
    rows = torch.zeros(1, dtype=torch.int64) if is_empty else torch.from_numpy(examples)
    rows = rows.to(device, non_blocking=True)
    stop += is_empty
    keys = {purpose: rng.row_keys(key(config.seed, purpose, run.step), start, stop, device) for purpose in ("augment", "dropout")}
    inputs = augment(source.train.images[rows], keys["augment"], config.augment, source.mean, source.std)
    logits = run.model(inputs.to(memory_format=run.memory_format), keys["dropout"])
    smoothing = config.optim.label_smoothing
    loss_sum = F.cross_entropy(logits.float(), source.train.labels[rows], reduction="sum", label_smoothing=smoothing)
    return loss_sum * 0 if is_empty else loss_sum


def _merge_statistics(norms: list[models.BatchNorm2d], table: Tensor, sampler: Sampler, step: int) -> None:
    """Update running statistics from all micro-batches of the step, in their order."""
    if not norms:
        return
    bounds = [sampler.micro_batch(step, index) for index in range(sampler.micro_batches)]
    counts = torch.tensor([stop - start for start, stop in bounds], dtype=torch.float32, device=table.device)
    widths = [norm.num_features for norm in norms for _ in range(2)]
    columns = iter(table.float().split(widths, dim=1))
    for norm in norms:
        norm.merge(next(columns), next(columns), counts)


def _clip(run: Run) -> Tensor | None:
    """Return the gradient norm, clipped to optim.clip_norm if that is on; None in steps that need no norm."""
    config, parameters = run.config, list(run.module.parameters())
    if config.optim.clip_norm:
        return run.world.accelerator.clip_grad_norm_(parameters, config.optim.clip_norm)
    if config.train.exact or is_due(run, config.log.every_steps, run.step + 1):
        run.world.accelerator.unscale_gradients(run.optimizer)
        return optim.grad_norm(parameters)
    return None


def check_loss(loss: float, step: int) -> None:
    """Raise RuntimeError if a loss is not a number any more."""
    if not math.isfinite(loss):
        raise RuntimeError(
            f"The loss of step {step} is {loss}. The last checkpoint is from before; try a smaller optim.lr or optim.clip_norm 1."
        )


def evaluate_run(run: Run) -> dict[str, Result]:
    """Evaluate the weights and, if they are averaged, their average. Collective: every rank must call it."""
    modules = {"weights": run.module} | ({"ema": run.ema.model} if run.ema else {})
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


def take_fingerprints(run: Run) -> dict[str, list[str]]:
    """Return and forget the bits of the steps since the last call, at least one. A host-device sync: call it where one is due."""
    columns = {"loss": [loss for loss, _ in run.fingerprints], "grad_norm": [norm for _, norm in run.fingerprints]}
    run.fingerprints.clear()
    return {name: [fingerprint.encode(name, value) for value in torch.stack(columns[name]).tolist()] for name in columns}


def record_fingerprints(run: Run, metrics: Metrics) -> None:
    """Write the row of the steps since the last such row; in exact mode only."""
    if run.fingerprints:
        first = run.step - len(run.fingerprints) + 1
        metrics.record("fingerprint", run.step, first=first, **take_fingerprints(run))


def save(run: Run, checkpoints: Path, metrics: Metrics) -> None:
    """Write a checkpoint of the current step and prune old ones. Collective: every rank must call it.

    The rows come first: a resume keeps the rows up to its checkpoint's step, so whole stretches must end there.
    """
    record_fingerprints(run, metrics)
    state = make_state(run)
    if run.world.is_main:
        metrics.record("saved", run.step, weights_sha256=checkpoint.tensors_sha256(state.model))
        checkpoint.write(checkpoints, run.step, checkpoint.encode(state))
        checkpoint.prune(checkpoints, run.config.checkpoint.keep, {run.step, run.best["step"] if run.best else run.step})


def find_checkpoint(config: Config, checkpoints: Path, metrics: Metrics, world: World) -> tuple[str, checkpoint.State] | None:
    """Return (its path, its state) of the checkpoint to go on from, or None. Collective: every rank must call it."""
    found, error = None, None
    if world.is_main:
        try:
            if config.run.resume == "auto":
                found = checkpoint.latest(checkpoints, metrics.say)
            elif config.run.resume == "never":
                if checkpoint.directories(checkpoints):
                    raise UserError(f"{checkpoints.parent} holds a run, and run.resume is never. Use another run.name.")
            else:
                path = Path(config.run.resume)
                found = path, checkpoint.read(path)
        except UserError as problem:
            error = problem
    world.agree(error)
    found = world.broadcast(found)
    return (str(found[0]), checkpoint.decode(found[1])) if found else None


class Stopwatch:
    """Adds up the seconds spent in steps; synchronizes the device at both ends."""

    def __init__(self, run: Run) -> None:
        self.run, self.started = run, time.perf_counter()

    def start(self) -> None:
        """Begin a stretch of steps."""
        self.started = time.perf_counter()

    def stop(self) -> None:
        """End a stretch of steps and enter it in the run."""
        if self.run.world.device.type == "cuda":
            torch.cuda.synchronize(self.run.world.device)  # a host-device sync, once per row of the log
        now = time.perf_counter()
        self.run.train_seconds += now - self.started
        self.run.life_seconds += now - self.started
        self.started = now


def log_step(run: Run, result: StepResult, metrics: Metrics) -> None:
    """Write the row of the step that just ended."""
    per_second = run.life_examples / max(run.life_seconds, 1e-9)
    steps_left = run.total_steps - run.step
    record_fingerprints(run, metrics)  # even of a loss that is not finite: they say at which step it went wrong
    loss = float(result.loss)
    check_loss(loss, run.step - 1)
    norm = float(result.grad_norm) if result.grad_norm is not None else None
    metrics.record(
        "train",
        run.step,
        epoch=run.step / run.sampler.steps_per_epoch,
        loss=loss,
        lr=result.lr,
        grad_norm=norm if norm is not None and math.isfinite(norm) else None,  # fp16 overflows while it finds its scale
        images_per_second=round(per_second, 1),
        train_seconds=round(run.train_seconds, 4),
        seconds_left=round(steps_left * run.sampler.global_batch_size / per_second, 1),
    )


def finish_step(run: Run, metrics: Metrics, checkpoints: Path, *, leaving: bool) -> dict[str, Result] | None:
    """Evaluate and save if that is due after the step that just ended. Collective: every rank must call it."""
    close_epoch(run)
    results, improved = None, False
    if is_due(run, run.config.eval.every_steps, run.step):
        results = evaluate_run(run)
        for name, result in results.items():
            metrics.record("eval", run.step, split=run.data.eval_split, ema=name == "ema", **result.record())
        metrics.record_weights(run.step, run.module)
        accuracy = list(results.values())[-1].accuracy
        improved = run.best is None or accuracy > run.best["accuracy"]
        if improved:
            run.best = {"step": run.step, "accuracy": accuracy}
    if improved or leaving or is_due(run, run.config.checkpoint.every_steps, run.step):
        save(run, checkpoints, metrics)
    return results


def train(config: Config, world: World, run_dir: Path, argv: list[str]) -> tuple[str, dict[str, Any]]:
    """Train to the end or until told to leave -> (outcome: finished | preempted, the summary).

    Collective: every rank must call it. Raises UserError for bad config or data, RuntimeError for what fails on the way.
    """
    began = time.perf_counter()
    with Metrics(config, run_dir, is_main=world.is_main, total_steps=0) as metrics:
        source = data.load(config.data, world, metrics.say)
        run = set_up(config, world, source)
        metrics.total_steps = run.total_steps
        checkpoints = run_dir / "checkpoints"
        if world.is_main:
            checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint.sweep(checkpoints)
        found = find_checkpoint(config, checkpoints, metrics, world)
        warnings = restore(run, found[1], found[0]) if found else []
        if world.is_main:
            (run_dir / "config.yaml").write_text(config.to_yaml())
        rows = metrics.open(run.step)
        kept = [row["train_seconds"] for row in rows if row["event"] == "train"]
        run.train_seconds = kept[-1] if kept else 0.0
        for line in (headline(run, run_dir, found[0] if found else None), arithmetic(run), *warnings):
            metrics.say(line)
        facts = {"world_size": world.world_size, "data": source.summary(), "resumed_from": found[0] if found else None}
        metrics.record("start", run.step, command=argv, **facts)
        finished = world.broadcast(read_finished(run_dir / "summary.json", run))
        if finished:
            metrics.say("This run is finished; nothing to do.")
            return "finished", finished
        outcome, results = run_steps(run, metrics, checkpoints)
        if outcome == "finished" and results is None:  # killed between the last save and the summary
            results = evaluate_run(run)
        summary = summarize(run, outcome, results or {}, time.perf_counter() - began)
        if world.is_main:
            if results:  # before the summary: one that is current has exhibits of the same step
                exhibits.write(run_dir / "exhibits.safetensors", exhibits.collect(run, results))
            summary["fingerprints"] = fingerprint.receipt(read_rows(metrics.path))
            write_json(run_dir / "summary.json", summary)
        world.barrier()  # nobody leaves while rank 0 still writes: a launcher would kill it
        return outcome, summary


def run_steps(run: Run, metrics: Metrics, checkpoints: Path) -> tuple[str, dict[str, Result] | None]:
    """Step until the end, or until a signal has reached any rank -> (outcome, results of the last step's evaluation)."""
    results = None
    watch = Stopwatch(run)
    run.model.train()
    first = run.step
    while run.step < run.total_steps:
        result = train_step(run)
        if run.step == first + 1:
            run.world.set_timeout(run.config.train.timeout)
        logs = is_due(run, run.config.log.every_steps, run.step)
        # Reading the flag waits for the device: on a GPU only in steps that wait anyway, the same on all ranks.
        leaving = (logs or run.world.device.type == "cpu") and float(result.stops) > 0
        if logs:
            watch.stop()
            log_step(run, result, metrics)
        due = is_due(run, run.config.eval.every_steps, run.step) or is_due(run, run.config.checkpoint.every_steps, run.step)
        if due or leaving or run.step % run.sampler.steps_per_epoch == 0:
            watch.stop()
            results = finish_step(run, metrics, checkpoints, leaving=leaving)
            watch.start()
        if leaving and run.step < run.total_steps:
            metrics.record("preempted", run.step, signal=preempt.requested())
            return "preempted", None
    return "finished", results

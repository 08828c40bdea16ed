"""One update: global batch -> micro-batches -> gradients, met over the ranks -> update, or none if a number is broken.

Invariant: what a step computes is a function of (config, step) and the state after the step before; the clock, the log and
the world size never enter it. A loss or a gradient norm that is not finite reaches neither weights nor running statistics:
every rank sees the same reduced numbers, so all decide alike, and they decide on the device, without waiting for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train import models, optim, preempt, rng
from train.augment import augment
from train.errors import RunError
from train.run import Run
from train.sampler import Sampler, key

NAMED_EXAMPLES = 8  # of a broken micro-batch, in the error


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, on the device: reading it synchronizes."""

    loss: Tensor
    grad_norm: Tensor
    notes: Tensor  # float64 [M + 1, 2], see _gradients
    lr: float

    @property
    def stops(self) -> Tensor:
        """How many ranks were told to leave."""
        return self.notes[-1, 0]


def train_step(run: Run) -> StepResult:
    """Make one update from the global batch of `run.step`. Collective: every rank must call it.

    If loss or gradient norm are not finite the update is left out; `check_numbers` says so.
    """
    world, sampler, clock = run.world, run.sampler, run.world.clock
    clock.step = run.step + 1
    num_examples = sampler.batch_rows(run.step)
    is_whole = num_examples == sampler.global_batch_size  # a graph knows one size
    call = run.graphs if run.graphs is not None and is_whole else _call
    (table,) = call(_gradients, run, *_feed(run))
    clock.enter("optimizer")
    if preempt.requested() is not None:
        table[-1, 0] = 1
    table[world.rank, 1] = clock.lap()  # there are at least as many micro-batches as ranks
    world.sum_(table)
    lr = optim.lr(run.config.optim, run.step, run.total_steps)
    optim.set_lr(run.optimizer, lr)
    loss, grad_norm, is_sound = call(_update, run, table)
    notes = table[:, :2].clone() if run.norms else table
    run.step += 1
    run.life_examples += num_examples
    run.unchecked.append((run.step, is_sound, notes))
    if run.config.train.exact:
        run.fingerprints.append((_canonical(loss), _canonical(grad_norm)))
    return StepResult(loss, grad_norm, notes, lr)


def _call(work: Callable[..., tuple[Tensor, ...]], run: Run, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What `run.graphs` does with graphs."""
    return work(run, *inputs)


def _gradients(run: Run, rows: Tensor, keys: Tensor | None = None) -> tuple[Tensor]:
    """Fill the parameters' gradients, and return the step's table, float64 [M + 1, 2 + 2 * channels].

    One row per micro-batch: loss_sum, a rank's seconds, then each norm's mean and variance; the last row holds the ranks'
    stop flags. A rank fills its own rows; zeros elsewhere add up exactly, so the sum has the same bits on any world size.
    On the device alone: what changes from step to step comes in `rows` and `keys`. Collective: every rank must call it.
    """
    world, sampler, clock, norms = run.world, run.sampler, run.world.clock, run.norms
    width = 2 + 2 * sum(norm.num_features for norm in norms)
    table = torch.zeros(sampler.micro_batches + 1, width, dtype=torch.float64, device=world.device)
    own = sampler.own_micro_batches(world.rank, world.world_size)
    batch = _own_rows(run, rows, keys)
    weight = torch.full((), run.reducer.loss_scale / sampler.batch_rows(run.step), device=world.device)
    clock.enter("forward_backward")
    for index in own:
        with run.reducer.micro_batch(index, own):
            loss_sum = _micro_batch_loss(run, index, batch)
            if index == own[-1] and world.world_size > 1:
                clock.announce("all_reduce")  # of the gradients, while the backward pass goes on
            world.accelerator.backward(loss_sum, gradient=weight)  # of weight * loss_sum
            clock.enter("forward_backward")
        table[index, 0] = loss_sum.detach()
        if norms:
            table[index, 2:] = torch.cat([values for norm in norms for values in (norm.batch_mean, norm.batch_var)])
    return (table,)


def _update(run: Run, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take the optimizer's step, unless a number is broken, and move the averages. On the device alone, like `_gradients`.

    Returns the loss per example, float64 [], the gradient norm, float32 [], and whether both are numbers, bool [].
    """
    loss = table[:-1, 0].sum() / run.sampler.batch_rows(run.step)
    grad_norm = _clip(run)
    # fp16 overflows while it finds its scale; the scaler leaves such updates out itself
    has_scaler = run.world.accelerator.scaler is not None
    is_sound = (loss if has_scaler else loss + grad_norm).abs() < torch.inf
    _merge_statistics(run.norms, table[:-1, 2:], run.sampler, run.step, is_sound)
    inner = run.optimizer.optimizer
    inner.found_inf = (~is_sound).float()  # the fused kernels look at it where they run
    # accelerate's wrapper is for the scaler; it also looks for packages on the disk, in every step
    (run.optimizer if has_scaler else inner).step()
    inner.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.update(run.module)
    return loss, grad_norm, is_sound


def _canonical(value: Tensor) -> Tensor:
    """A value with one kind of NaN: its sign and payload would depend on who added up."""
    return value.masked_fill(value.isnan(), torch.nan)


@dataclass(frozen=True)
class _Rows:
    """This rank's rows [start, start + B) of the global batch, on the device; a dummy if it has none."""

    start: int
    inputs: Tensor  # float32 [B,1,28,28]
    labels: Tensor  # int64 [B]
    keys: Tensor | None  # int64 [B], of dropout


def _feed(run: Run) -> list[Tensor]:
    """What a step's device work needs of the host, on the device; the examples are entered in the ledger.

    The examples of this rank's micro-batches, int64 [B], and the keys of augmentation and dropout, int64 [2], if one is on.
    """
    config, sampler, step, device = run.config, run.sampler, run.step, run.world.device
    run.world.clock.enter("data")
    examples = sampler.examples(step, *sampler.rank_rows(step, run.world.rank, run.world.world_size))
    run.ledger.add(examples)
    feed = [examples if len(examples) else np.zeros(1, np.int64)]
    if config.augment.is_on or config.model.dropout:
        keys = [key(config.seed, purpose, step) for purpose in ("augment", "dropout")]
        feed.append(np.array(keys, np.uint64).view(np.int64))
    tensors = [torch.from_numpy(array) for array in feed]
    return [(each.pin_memory() if device.type == "cuda" else each).to(device, non_blocking=True) for each in tensors]


def _own_rows(run: Run, rows: Tensor, keys: Tensor | None) -> _Rows:
    """Gather and augment the examples of this rank's micro-batches."""
    config, source, clock = run.config, run.data, run.world.clock
    start, _ = run.sampler.rank_rows(run.step, run.world.rank, run.world.world_size)
    images, labels = source.train.images[rows], source.train.labels[rows]

    def row_keys(place: int, is_on: object) -> Tensor | None:
        return rng.row_keys(keys[place], start, start + len(rows), rows.device) if keys is not None and is_on else None

    clock.enter("augment")
    inputs = augment(images, row_keys(0, config.augment.is_on), config.augment, source.mean, source.std)
    inputs = inputs.to(memory_format=run.memory_format)
    return _Rows(start, inputs, labels, row_keys(1, config.model.dropout))


def _micro_batch_loss(run: Run, index: int, batch: _Rows) -> Tensor:
    """Return the summed loss, float32 [], over micro-batch `index` of the current step."""
    start, stop = run.sampler.micro_batch(run.step, index)
    inputs, labels, keys = batch.inputs, batch.labels, batch.keys
    if stop - start < len(labels):
        first = min(start - batch.start, len(labels) - 1)
        part = slice(first, first + max(stop - start, 1))  # of no examples: one that weighs nothing
        inputs, labels, keys = inputs[part], labels[part], keys[part] if keys is not None else None
    logits = run.model(inputs, keys)
    smoothing = run.config.optim.label_smoothing
    loss_sum = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
    return loss_sum if stop > start else loss_sum * 0


def _merge_statistics(norms: list[models.BatchNorm2d], table: Tensor, sampler: Sampler, step: int, is_sound: Tensor) -> None:
    """Update running statistics from all micro-batches of the step, in their order; not if a number is broken."""
    if not norms:
        return
    bounds = torch.arange(sampler.micro_batches + 1, device=table.device) * sampler.batch_rows(step) // sampler.micro_batches
    counts = bounds.diff().float()  # as Sampler.micro_batch cuts, made on the device: a copy to it would wait
    widths = [norm.num_features for norm in norms for _ in range(2)]
    columns = iter(table.float().split(widths, dim=1))
    for norm in norms:
        norm.merge(next(columns), next(columns), counts, is_sound)


def _clip(run: Run) -> Tensor:
    """Return the gradient norm; the gradients are clipped to optim.clip_norm if that is on."""
    accelerator, limit = run.world.accelerator, run.config.optim.clip_norm
    if limit:
        return accelerator.clip_grad_norm_(run.parameters, limit)
    accelerator.unscale_gradients(run.optimizer)
    return optim.grad_norm(run.parameters)


def check_numbers(run: Run) -> list[int]:
    """Look at the steps since the last call; return those that were left out. A host-device sync: call it where one is due.

    Raises RunError under optim.nonfinite stop, or when optim.max_skips is exceeded: on every rank after the same step.
    """
    unchecked, run.unchecked = run.unchecked, []
    sound = torch.stack([is_sound for _, is_sound, _ in unchecked]).tolist() if unchecked else []
    broken = [(step, notes[:-1, 0].tolist()) for (step, _, notes), ok in zip(unchecked, sound, strict=True) if not ok]
    run.skips += len(broken)
    config = run.config.optim
    if broken and (config.nonfinite == "stop" or run.skips > config.max_skips):
        step, losses = broken[0] if config.nonfinite == "stop" else broken[-1]
        allowed = "" if config.nonfinite == "stop" else f", and optim.max_skips {config.max_skips} were left out before it"
        raise RunError(
            f"The loss or the gradient of step {step} is not finite: {_blame(run, step - 1, losses)}{allowed}. "
            "The last checkpoint is from before; try a smaller optim.lr, optim.clip_norm 1 or optim.nonfinite skip."
        )
    return [step for step, _ in broken]


def _blame(run: Run, step: int, losses: list[float]) -> str:
    """Name the micro-batches of a step (from 0) whose loss is broken, and the first one's examples."""
    bad = [index for index, loss in enumerate(losses) if not abs(loss) < float("inf")]
    if not bad:
        return f"its {len(losses)} micro-batch(es) have finite losses, the gradient has not a finite norm"
    examples = run.sampler.examples(step, *run.sampler.micro_batch(step, bad[0])).tolist()
    named = ", ".join(map(str, examples[:NAMED_EXAMPLES])) + (", ..." if len(examples) > NAMED_EXAMPLES else "")
    others = f" (and {len(bad) - 1} more)" if bad[1:] else ""
    return f"loss {losses[bad[0]]} in micro-batch {bad[0]}{others} of {len(losses)}, training examples {named}"

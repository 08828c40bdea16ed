"""One update: global batch -> micro-batches -> gradients, met over the ranks -> update, or none if a number is broken.

Invariant: what a step computes is a function of (config, step) and the state after the step before; the clock, the log and
the world size never enter it. A loss or a gradient norm that is not finite reaches neither weights nor running statistics:
every rank sees the same reduced numbers, so all decide alike, and they decide on the device, without waiting for it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.errors import RunError
from train.functional import models, optim, rng
from train.functional.augment import augment, lay_out
from train.functional.tables import StepResult, StepStatistics
from train.run import Run
from train.world import signals

NAMED_EXAMPLES = 8  # of a broken micro-batch, in the error


def train_step(run: Run) -> None:
    """Make one update from the global batch of `run.step`. Collective: every rank must call it.

    Its numbers are in `run.tables`. If loss or gradient norm are not finite the update is left out; `is_left_out` finds it.
    """
    clock, tables, step = run.world.clock, run.tables, run.step
    clock.step = step + 1
    clock.enter("data")
    if not tables.start <= step < tables.stop:
        tables.fill(step)
    run.ledger.add(tables.examples[step - tables.start])
    if tables.lr is None:
        for group in run.optimizer.param_groups:
            group["lr"] = optim.lr(run.config.optim, step, run.total_steps)
    if run.replay is not None and run.sampler.is_whole(step):  # a graph has one size
        clock.enter("forward_backward")
        run.replay()
    else:
        compute(run, step)
    run.step += 1
    run.life_examples += run.sampler.batch_rows(step)


def compute(run: Run, step: int) -> None:
    """Do the work of a step at the place where `run.tables` are: gradients, exchange, update, statistics.

    On the device alone, but for what only several ranks exchange: nothing is read, and nothing but the size of the batch
    depends on `step`. Collective: every rank must call it.
    """
    statistics, is_alone = run.tables.statistics, run.world.world_size == 1
    if not is_alone:
        statistics.summed.zero_()
    _gradients(run, step, statistics)
    run.world.clock.enter("optimizer")
    if not is_alone:
        if signals.requested() is not None:
            statistics.stop_flags.fill_(1)
        statistics.rank_seconds[run.world.rank] = run.world.clock.lap()
        run.world.sum_(statistics.summed)
    _update(run, step, statistics)
    run.tables.keep()


def _gradients(run: Run, step: int, statistics: StepStatistics) -> None:
    """Fill the parameters' gradients, and the statistics of this rank's micro-batches. Collective: every rank must call it."""
    world, clock, norms = run.world, run.world.clock, run.norms
    own = run.sampler.own_micro_batches(world.rank, world.world_size)
    batch = _own_rows(run, step)
    weight, _ = _constants(run, run.sampler.batch_rows(step))
    clock.enter("forward_backward")
    for index in own:
        with run.reducer.micro_batch(index, own):
            loss_sum = _micro_batch_loss(run, index, batch)
            if index == own[-1] and world.world_size > 1:
                clock.announce("all_reduce")  # of the gradients, while the backward pass goes on
            if world.accelerator.scaler is None:
                loss_sum.backward(weight)  # the gradients of weight * loss_sum; accelerate would also divide by 1
            else:
                world.accelerator.backward(loss_sum, gradient=weight)
            clock.enter("forward_backward")
        statistics.loss_sums[index] = loss_sum.detach()
        if norms:
            statistics.batch_norms[index] = torch.cat(
                [*(norm.batch_mean for norm in norms), *(norm.batch_var for norm in norms)]
            )


def _update(run: Run, step: int, statistics: StepStatistics) -> None:
    """Take the optimizer's step, unless a number is broken, and move the averages."""
    optim.align_gradients(run.parameters)
    loss = torch.div(statistics.loss_sums.sum(), run.sampler.batch_rows(step), out=statistics.loss)
    grad_norm = _clip(run)
    statistics.grad_norm.copy_(grad_norm)
    has_scaler = run.tables.has_scaler
    total = loss if has_scaler else loss + grad_norm
    found_inf = torch.empty((), device=loss.device)
    torch.ne(total * 0, 0, out=found_inf)  # 1 where it is not finite, else 0
    if run.norms:
        _, shares = _constants(run, run.sampler.batch_rows(step))
        models.merge_statistics(run.norms, statistics.batch_norms.float(), shares, found_inf == 0)
    run.tables.next_lr()
    inner = run.optimizer.optimizer
    inner.found_inf = found_inf  # the fused kernels look at it where they run
    # accelerate's wrapper is for the scaler; it also looks for packages on the disk, in every step
    (run.optimizer if has_scaler else inner).step()
    inner.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.update(run.module)


@dataclass(frozen=True)
class _Rows:
    """This rank's rows [start, start + B) of the global batch of a step, on the device; a dummy if it has none."""

    step: int
    start: int
    inputs: Tensor  # float32 [B,1,28,28]
    labels: Tensor  # int64 [B]
    keys: Tensor | None  # int64 [B], of dropout


def _own_rows(run: Run, step: int) -> _Rows:
    """Gather and augment the examples of this rank's micro-batches."""
    config, source, tables = run.config, run.data, run.tables
    start, _ = run.sampler.rank_rows(step, run.world.rank, run.world.world_size)
    is_whole = run.sampler.is_whole(step)
    rows = tables.rows.index_select(0, tables.place)[0] if is_whole else tables.short_rows
    images, labels = source.train.images[rows], source.train.labels[rows]
    keys = tables.keys.index_select(0, tables.place)[0] if tables.has_keys else None

    def row_keys(column: int, is_on: object) -> Tensor | None:
        return rng.row_keys(keys[column], start, start + len(rows), rows.device) if keys is not None and is_on else None

    run.world.clock.enter("augment")
    inputs = augment(images, row_keys(0, config.augment.is_on), config.augment, source.mean, source.std)
    return _Rows(step, start, lay_out(inputs, run.memory_format), labels, row_keys(1, config.model.dropout))


def _micro_batch_loss(run: Run, index: int, batch: _Rows) -> Tensor:
    """Return the summed loss, float32 [], over micro-batch `index`."""
    start, stop = run.sampler.micro_batch(batch.step, index)
    inputs, labels, keys = batch.inputs, batch.labels, batch.keys
    if stop - start < len(labels):
        first = min(start - batch.start, len(labels) - 1)
        part = slice(first, first + max(stop - start, 1))  # of no examples: one that weighs nothing
        inputs, labels, keys = inputs[part], labels[part], keys[part] if keys is not None else None
    logits = run.model(inputs, keys)
    smoothing = run.config.optim.label_smoothing
    loss_sum = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
    return loss_sum if stop > start else loss_sum * 0


def _constants(run: Run, num_examples: int) -> tuple[Tensor, Tensor]:
    """Return the weight of a batch's loss, float32 [], and its micro-batches' shares: made once for each size of a batch."""
    if num_examples not in run.constants:
        weight = torch.full((), run.reducer.loss_scale / num_examples, device=run.world.device)
        run.constants[num_examples] = weight, _shares(num_examples, run.sampler.micro_batches, run.world.device)
    return run.constants[num_examples]


def _shares(num_examples: int, num_micro_batches: int, device: torch.device) -> Tensor:
    """Return the share of the examples that each micro-batch has, float32 [M], as `Sampler.micro_batch` cuts."""
    counts = (torch.arange(num_micro_batches + 1, device=device) * num_examples // num_micro_batches).diff().float()
    return counts / counts.sum()


def _clip(run: Run) -> Tensor:
    """Return the gradient norm, float32 []; the gradients are clipped to optim.clip_norm if that is on."""
    run.world.accelerator.unscale_gradients(run.optimizer)
    norm, limit = optim.grad_norm(run.parameters), run.config.optim.clip_norm
    if limit:
        torch.nn.utils.clip_grads_with_norm_(run.parameters, limit, norm)
    return norm


def is_left_out(run: Run, result: StepResult) -> bool:
    """Return whether a step's update was left out, and count it. Call it for each step in turn.

    Raises RunError under optim.nonfinite stop, or when optim.max_skips is exceeded: on every rank after the same step.
    """
    if result.is_sound:
        return False
    run.skips += 1
    config = run.config.optim
    if config.nonfinite == "stop" or run.skips > config.max_skips:
        allowed = (
            "" if config.nonfinite == "stop" else f", and optim.max_skips {config.max_skips} were left out before it"
        )
        raise RunError(
            f"The loss or the gradient of step {result.step} is not finite: {_blame(run, result)}{allowed}. "
            "The last checkpoint is from before; try a smaller optim.lr, optim.clip_norm 1 or optim.nonfinite skip."
        )
    return True


def _blame(run: Run, result: StepResult) -> str:
    """Name the micro-batches of a step whose loss is broken, and the first one's examples."""
    losses, step = result.loss_sums, result.step - 1
    bad = [index for index, loss in enumerate(losses) if not abs(loss) < float("inf")]
    if not bad:
        return f"its {len(losses)} micro-batch(es) have finite losses, the gradient has not a finite norm"
    examples = run.sampler.examples(step, *run.sampler.micro_batch(step, bad[0])).tolist()
    named = ", ".join(map(str, examples[:NAMED_EXAMPLES])) + (", ..." if len(examples) > NAMED_EXAMPLES else "")
    others = f" (and {len(bad) - 1} more)" if bad[1:] else ""
    return f"loss {losses[bad[0]]} in micro-batch {bad[0]}{others} of {len(losses)}, training examples {named}"

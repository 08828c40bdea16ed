"""One update: global batch -> micro-batches -> gradients, summed over the ranks -> optimizer.

Invariant: what a step computes is a function of (config, step) and the state after the step before. The clock, the log
and the world size never enter it. A loss or gradient norm that is not finite reaches neither the weights nor the
running statistics: every rank sees the same reduced numbers, and the decision is made on the device, without waiting
for it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.functional import layers, optim, rng
from train.functional.augment import augment, lay_out
from train.state import Plan, State
from train.world import signals


def prepare_step(plan: Plan, state: State) -> None:
    """Put the rows, keys and learning rate of the next step on the device, and enter its examples in the ledger."""
    step, tables = state.step, plan.tables
    plan.world.clock.step = step + 1
    plan.world.clock.enter("data")
    if not tables.start <= step < tables.stop:
        tables.fill(step)
    state.ledger.add(tables.examples[step - tables.start])
    if tables.lr is None:
        for group in state.optimizer.param_groups:
            group["lr"] = optim.lr(plan.config.optim, step, plan.total_steps)


def train_step(plan: Plan, state: State) -> None:
    """Make the update of `state.step`, which `prepare_step` has prepared. Collective: every rank must call it.

    This is the device's work: no number is read, and nothing but the size of the batch depends on the step, so that a
    CUDA graph can repeat it. The results are in `plan.tables`. The journal finds an update that was left out.
    """
    world, clock, tables = plan.world, plan.world.clock, plan.tables
    statistics, is_alone = tables.statistics, world.world_size == 1
    num_examples = plan.sampler.batch_rows(state.step)
    loss_weight, shares = tables.loss_weights(num_examples)
    if not is_alone:
        statistics.summed.zero_()
    batch = _own_rows(plan, state)
    clock.enter("forward_backward")
    for part in plan.passes:
        with plan.reducer.one_pass(part, plan.own):
            loss_sums = _loss_sums(plan, state, part, batch)
            _backward(plan, loss_sums, loss_weight)
            clock.enter("forward_backward")
        micro_batches = slice(part.start, part.stop)
        statistics.loss_sums[micro_batches] = loss_sums.detach()
        if state.batch_norms:
            statistics.batch_norms[micro_batches] = layers.batch_statistics(state.batch_norms)
    clock.enter("optimizer")
    if not is_alone:
        if signals.requested() is not None:
            statistics.stop_flags.fill_(1)
        statistics.rank_seconds[world.rank] = clock.take_lap()
        world.all_reduce_sum_(statistics.summed)
    optim.align_gradients(state.parameters)
    torch.div(statistics.loss_sums.sum(), num_examples, out=statistics.loss)
    statistics.grad_norm.copy_(_clip(plan, state))
    found_inf = tables.found_inf()
    if state.batch_norms:
        layers.merge_statistics(state.batch_norms, statistics.batch_norms.float(), shares, found_inf == 0)
    tables.load_lr()
    optimizer = state.optimizer.optimizer
    optimizer.found_inf = found_inf  # the fused kernels read it on the device
    # accelerate's wrapper is for the scaler. It also looks for packages on the disk, in every step.
    (state.optimizer if tables.has_scaler else optimizer).step()
    optimizer.zero_grad(set_to_none=True)
    if state.ema:
        state.ema.update(state.module)
    tables.store_result()


@dataclass(frozen=True)
class _Rows:
    """This rank's rows [start, start + B) of the global batch of a step, on the device; a dummy if it has none."""

    step: int
    start: int
    inputs: Tensor  # float32 [B,C,H,W]
    labels: Tensor  # int64 [B]
    keys: Tensor | None  # int64 [B], of dropout


def _own_rows(plan: Plan, state: State) -> _Rows:
    """Gather and augment the examples of this rank's micro-batches."""
    config, data, tables = plan.config, plan.data, plan.tables
    start, stop = plan.sampler.rank_rows(state.step, plan.world.rank, plan.world.world_size)
    rows = tables.rows.index_select(0, tables.row_index)[0, : max(stop - start, 1)]
    images, labels = data.train.images[rows], data.train.labels[rows]
    keys = tables.keys.index_select(0, tables.row_index)[0] if tables.has_keys else None

    def row_keys(column: int, is_on: object) -> Tensor | None:
        return rng.row_keys(keys[column], start, start + len(rows), rows.device) if keys is not None and is_on else None

    plan.world.clock.enter("augment")
    inputs = augment(images, row_keys(0, config.augment.is_on), config.augment, data.mean, data.std)
    return _Rows(state.step, start, lay_out(inputs, plan.memory_format), labels, row_keys(1, state.dropouts))


def _loss_sums(plan: Plan, state: State, part: range, batch: _Rows) -> Tensor:
    """Return the summed loss of each micro-batch in `part`, float32 [G], from one forward pass."""
    bounds = [plan.sampler.micro_batch(batch.step, index) for index in part]
    sizes = [stop - start for start, stop in bounds]
    if is_empty := not any(sizes):
        sizes[0] = 1  # one that weighs nothing
    inputs, labels, keys = batch.inputs, batch.labels, batch.keys
    if sum(sizes) < len(labels):
        first = min(bounds[0][0] - batch.start, len(labels) - 1)
        rows = slice(first, first + sum(sizes))
        inputs, labels, keys = inputs[rows], labels[rows], keys[rows] if keys is not None else None
    with layers.one_pass(state.dropouts, state.batch_norms, keys, sizes):
        logits = state.model(inputs)
    smoothing = plan.config.optim.label_smoothing
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    if min(sizes) == max(sizes):
        loss_sums = losses.view(len(sizes), -1).sum(1)  # one kernel
    else:
        loss_sums = torch.stack([each.sum() for each in losses.split(sizes)])
    return loss_sums * 0 if is_empty else loss_sums


def _backward(plan: Plan, loss_sums: Tensor, weight: Tensor) -> None:
    """Add the gradients of the weighted sum of all `loss_sums`, float32 [G], to the parameters'."""
    weights = weight.expand(len(loss_sums))
    if plan.tables.has_scaler:
        plan.world.accelerator.backward(loss_sums, gradient=weights)
    else:
        loss_sums.backward(weights)  # accelerate would also divide by 1


def _clip(plan: Plan, state: State) -> Tensor:
    """Return the gradient norm, float32 []; clip the gradients to optim.clip_norm if that is on."""
    plan.world.accelerator.unscale_gradients(state.optimizer)
    norm, limit = optim.grad_norm(state.parameters), plan.config.optim.clip_norm
    if limit:
        torch.nn.utils.clip_grads_with_norm_(state.parameters, limit, norm)
    return norm

"""A run between two steps: the plan, which is fixed, and the state, which moves. Built from a config, saved, restored.

Invariant: what a checkpoint holds, together with the config and the data, decides every later step. Nothing else does.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from train.config import Config, TrainConfig
from train.errors import UserError, one_line
from train.functional import layers, optim
from train.functional.augment import check_sizes
from train.functional.sampler import Sampler, coverage_checksum
from train.functional.tables import StepTables
from train.functional.trajectory import differences, effective, trajectory
from train.storage import checkpoint, network
from train.storage.data import Data
from train.world.environment import environment, environment_differences
from train.world.graphs import leave_default_stream
from train.world.launcher import check_world_size
from train.world.reduce import Allreduce, ExactTree
from train.world.world import World

MAX_PENDING = 64  # steps whose examples wait to be entered in the ledger's sum


@dataclass
class Ledger:
    """The coverage checksum of an epoch: an order-free sum and a count over the examples used by this rank."""

    total: int = 0
    count: int = 0
    pending: list[np.ndarray] = field(default_factory=list)  # not in the sum yet: many at once cost a tenth

    def add(self, examples: np.ndarray) -> None:
        """Enter examples that this rank trains on."""
        self.pending.append(examples)
        self.count += len(examples)
        if len(self.pending) >= MAX_PENDING:
            self.fold()

    def fold(self) -> None:
        """Put what is pending into the sum."""
        if self.pending:
            self.total = (self.total + coverage_checksum(np.concatenate(self.pending))) % 2**64
            self.pending.clear()

    def reduced(self, world: World) -> tuple[int, int]:
        """Return (sum, count) over all ranks. Collective: every rank must call it."""
        self.fold()
        signed = self.total - 2**64 if self.total >= 2**63 else self.total
        total, count = world.all_reduce_sum_(torch.tensor([signed, self.count])).tolist()
        return total % 2**64, count


@dataclass(frozen=True)
class Plan:
    """What is fixed from a run's first step to its last."""

    config: Config
    world: World
    data: Data
    sources: dict[str, bytes]  # of the user's network, by relative path
    sha256: dict[str, str]  # of "data", and of "network" and "initial_weights" if they come from files
    sampler: Sampler
    total_steps: int
    reducer: Allreduce | ExactTree
    tables: StepTables  # what steps read and write on the device
    memory_format: torch.memory_format
    should_record: bool  # whether the warm-up records the step as a CUDA graph

    @property
    def own(self) -> range:
        """The micro-batches of this rank."""
        return self.sampler.own_micro_batches(self.world.rank, self.world.world_size)

    @property
    def passes(self) -> list[range]:
        """The micro-batches that this rank computes in each of its passes, forward and backward."""
        config, own = self.config.train, self.own
        if config.exact:
            most = 1  # the tree adds up the gradients of single micro-batches
        elif config.max_micro_batch_size:
            micro_batch_size = -(-self.sampler.global_batch_size // self.sampler.num_micro_batches)
            most = max(1, config.max_micro_batch_size // micro_batch_size)
        else:
            most = len(own)
        return [own[first : first + most] for first in range(0, len(own), most)]

    def should_log(self, step: int) -> bool:
        """Whether a row is due after `step` updates."""
        return self._is_due(self.config.log.every_steps, step)

    def should_evaluate(self, step: int) -> bool:
        """Whether an evaluation is due after `step` updates."""
        return self._is_due(self.config.eval.every_steps, step)

    def should_save(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` updates."""
        return self._is_due(self.config.checkpoint.every_steps, step)

    def should_sync(self, step: int) -> bool:
        """Whether the results so far must be read: for an evaluation, a save, or before they are overwritten."""
        return self.should_evaluate(step) or self.should_save(step) or step == self.tables.stop

    def is_epoch_end(self, step: int) -> bool:
        """Whether `step` updates are whole epochs."""
        return step % self.sampler.steps_per_epoch == 0

    def _is_due(self, every_steps: int, step: int) -> bool:
        """Whether periodic work is due. 0 means once an epoch; the last step always is."""
        return step % (every_steps or self.sampler.steps_per_epoch) == 0 or step == self.total_steps


@dataclass
class Timing:
    """Seconds and examples of this attempt. `train_seconds` covers all attempts, up to their checkpoints."""

    train_seconds: float = 0.0
    step_seconds: float = 0.0
    num_examples: int = 0
    warm_up_seconds: float = 0.0

    @property
    def images_per_second(self) -> float | None:
        """Examples per second of this attempt's steps; None before the first."""
        return self.num_examples / self.step_seconds if self.step_seconds else None


@dataclass
class State:
    """What moves with the steps."""

    model: nn.Module  # as accelerate prepared it: precision, DDP
    module: nn.Module  # the network inside
    optimizer: Any  # accelerate's wrapper of a torch.optim.Optimizer
    ema: optim.Ema | None
    step: int = 0  # finished updates
    ledger: Ledger = field(default_factory=Ledger)
    closed_epoch: dict[str, Any] | None = None  # step, sum and count of the ledger of the last whole epoch
    skipped_steps: int = 0  # updates left out because of numbers that are not finite
    best: dict[str, Any] | None = None  # step and accuracy of the best evaluation so far
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        """List the trainable parameters and our layers in a fixed order."""
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.batch_norms, self.dropouts = layers.batch_norms(self.module), layers.dropouts(self.module)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The weights, "raw", and their average, "ema", if there is one. The last one is the run's result."""
        return {"raw": self.module} | ({"ema": self.ema.model} if self.ema else {})


def resolve_num_micro_batches(config: TrainConfig, world_size: int, *, has_batch_norm: bool) -> int:
    """Return the number of micro-batches of a step. Raises UserError if the config does not fit the world size."""
    size, limit = config.global_batch_size, config.max_micro_batch_size
    check_world_size(config, world_size)
    if config.num_micro_batches:
        return config.num_micro_batches
    if has_batch_norm:
        raise UserError(
            "This model has BatchNorm, so train.num_micro_batches decides what it learns. "
            "Set it to the largest world size that you want to use, such as --train.num_micro_batches 8."
        )
    return world_size * (-(-size // (world_size * limit)) if limit else 1)


def set_up(config: Config, world: World, data: Data) -> tuple[Plan, State]:
    """Build the plan and the state before the first step. Collective: every rank must call it."""
    check_sizes(config.augment, data.shape)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    with world.raising_together():
        options = config.seed, config.train.channels_last, config.optim.ema > 0
        found = network.build(config.model, data.shape, data.num_classes, *options)
    with world.raising_together():
        made = [found.sha256, list(found.module.state_dict())]  # an iteration over a set gives each rank another order
        if world.broadcast(made) != made:
            raise UserError(
                f"model.name {config.model.name} or model.weights give another network on rank {world.rank}."
            )
    module = found.module.to(device=world.device, memory_format=memory_format)  # type: ignore[call-overload]
    if config.train.compile:
        module.compile()
    batch_norms = layers.batch_norms(module)
    num_micro_batches = resolve_num_micro_batches(config.train, world.world_size, has_batch_norm=bool(batch_norms))
    sampler = Sampler(len(data.train), config.train.global_batch_size, num_micro_batches, config.seed)
    ema = optim.Ema(module, config.optim.ema) if config.optim.ema else None
    model, optimizer = world.prepare(module, optim.build(config.optim, module))
    owners = [sampler.own_micro_batches(rank, world.world_size) for rank in range(world.world_size)]
    reducer = ExactTree(model, world, num_micro_batches, owners) if config.train.exact else Allreduce(model, world)
    total_steps = config.train.max_steps or config.train.epochs * sampler.steps_per_epoch
    num_channels = sum(layer.num_features for layer in batch_norms)
    tables = StepTables(
        *(config, sampler, total_steps, num_channels, world.rank, world.world_size, world.device),
        loss_scale=reducer.loss_scale,
        has_dropout=bool(layers.dropouts(module)),
        has_scaler=world.accelerator.scaler is not None,
    )
    if world.device.type != "cpu":
        tables.keep_lr_on_device(optimizer)
    should_record = config.train.cuda_graphs != "off" and not why_not_recordable(world)
    if should_record:
        leave_default_stream(world.device)
    model.train()
    sources = found.sources, {"data": data.sha256, **found.sha256}
    plan = Plan(config, world, data, *sources, sampler, total_steps, reducer, tables, memory_format, should_record)
    return plan, State(model, module, optimizer, ema)


def why_not_recordable(world: World) -> str:
    """Return why a step cannot be recorded as a CUDA graph here, or "" if it can."""
    if world.device.type != "cuda":
        return "no GPU"
    if world.world_size > 1:
        return f"{world.world_size} processes, which exchange gradients in the middle of a step"
    return "fp16, whose scaler waits for the GPU" if world.accelerator.scaler is not None else ""


def snapshot(plan: Plan, state: State) -> checkpoint.Snapshot:
    """Collect what a checkpoint holds. Collective: every rank must call it."""
    scaler = plan.world.accelerator.scaler
    meta = {
        "step": state.step,
        "trajectory": trajectory(plan.config),
        "sha256": plan.sha256,
        "data": plan.data.facts(),
        "ledger": dict(zip(("sum", "count"), state.ledger.reduced(plan.world), strict=True)),
        "closed_epoch": state.closed_epoch,
        "best": state.best,
        "skipped_steps": state.skipped_steps,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "environment": environment(plan.world),
    }
    ema = checkpoint.model_tensors(state.ema.model) if state.ema else {}
    optimizer = checkpoint.optimizer_tensors(state.optimizer.optimizer, state.module)
    return checkpoint.Snapshot(checkpoint.model_tensors(state.module), optimizer, ema, meta)


def restore(plan: Plan, state: State, saved: checkpoint.Snapshot, source: str) -> list[str]:
    """Put a checkpoint into a fresh state; return warnings. Raises UserError if it belongs to another run."""
    try:
        return _restore(plan, state, saved, source)
    except checkpoint.Damaged as error:
        raise checkpoint.Damaged(f"{source}: {error}") from None
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # whole, and yet not ours
        what = f"{type(error).__name__} {one_line(error, 100)}"
        raise checkpoint.Damaged(f"{source} is not a checkpoint of this program: {what}.") from error


def _restore(plan: Plan, state: State, saved: checkpoint.Snapshot, source: str) -> list[str]:
    meta, scaler = saved.meta, plan.world.accelerator.scaler
    changed = differences(effective(meta["trajectory"]), trajectory(plan.config))
    before, after = ({name: sha256[:12] for name, sha256 in each.items()} for each in (meta["sha256"], plan.sha256))
    changed += differences(before, after)
    if changed:
        raise UserError(
            f"{source} belongs to another run: {', '.join(changed)}. Undo that, or start a new run: another run.name, "
            f"and --model.weights {source}/model.safetensors to begin with these weights."
        )
    state.step, state.best = meta["step"], meta["best"]
    state.closed_epoch, state.skipped_steps = meta["closed_epoch"], meta["skipped_steps"]
    if not (type(state.step) is int and 0 <= state.step <= plan.total_steps):
        raise ValueError(f"step {state.step!r} of {plan.total_steps}")
    if state.best is not None:
        state.best = {"step": int(state.best["step"]), "accuracy": float(state.best["accuracy"])}
    checkpoint.restore_model(state.module, saved.model)
    if state.ema:
        checkpoint.restore_model(state.ema.model, saved.ema)
    checkpoint.restore_optimizer(state.optimizer.optimizer, state.module, saved.optimizer)
    if meta["scaler"] is not None and scaler is not None:
        scaler.load_state_dict(meta["scaler"])
    ledger = Ledger(int(meta["ledger"]["sum"]), int(meta["ledger"]["count"]))
    if plan.world.is_main:  # the sum so far counts once over all ranks
        state.ledger = ledger
    differs = environment_differences(meta["environment"], environment(plan.world))
    return [f"The bits may differ from an undisturbed run's: {', '.join(differs)}."] if differs else []

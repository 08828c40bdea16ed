"""The state of a run between two steps: built from a config, turned into a checkpoint, restored from one.

Invariant: what a checkpoint holds, together with the config and the data, decides every later step; nothing else does.
"""

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train.config import Config
from train.errors import UserError
from train.functional import models, optim
from train.functional.sampler import Sampler, ledger_sum
from train.functional.tables import StepTables
from train.mathematics import contract_differences, differences, mathematics
from train.storage import checkpoint, data
from train.world.graphs import leave_default_stream
from train.world.reduce import Allreduce, ExactTree
from train.world.versions import versions
from train.world.world import World

MOST_PENDING = 64  # steps whose examples wait to be entered in the ledger's sum


@dataclass
class Ledger:
    """Proof that an epoch used each example once: an order-free sum and a count over this rank's examples so far."""

    total: int = 0
    count: int = 0
    pending: list[np.ndarray] = field(default_factory=list)  # not in the sum yet: many at once cost a tenth

    def add(self, examples: np.ndarray) -> None:
        """Enter examples that this rank trains on."""
        self.pending.append(examples)
        self.count += len(examples)
        if len(self.pending) >= MOST_PENDING:
            self.fold()

    def fold(self) -> None:
        """Put what is pending into the sum."""
        if self.pending:
            self.total = (self.total + ledger_sum(np.concatenate(self.pending))) % 2**64
            self.pending.clear()

    def reduced(self, world: World) -> tuple[int, int]:
        """Return (sum, count) over all ranks. Collective: every rank must call it."""
        self.fold()
        signed = self.total - 2**64 if self.total >= 2**63 else self.total
        total, count = world.sum_(torch.tensor([signed, self.count])).tolist()
        return total % 2**64, count


@dataclass
class Run:
    """The state of a run between two steps, and what its steps need."""

    config: Config
    world: World
    data: data.Data
    sampler: Sampler
    total_steps: int
    model: nn.Module  # as accelerate prepared it: precision, DDP
    module: nn.Module  # the network inside
    optimizer: Any
    ema: optim.Ema | None
    reducer: Allreduce | ExactTree
    memory_format: torch.memory_format
    tables: StepTables  # what steps read and write on the device
    should_record: bool  # whether `warm_up` records the step as a CUDA graph
    constants: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # by size of a batch; graphs hold their addresses
    replay: Callable[[], object] | None = None  # the recorded step; None: a step starts its kernels one by one
    step: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    closed_epoch: dict[str, Any] | None = None  # {"step", "sum", "count"} of the ledger of the last whole epoch
    skips: int = 0  # updates left out because of numbers that are not finite
    best: dict[str, Any] | None = None  # {"step", "accuracy"} of the best evaluation so far
    train_seconds: float = 0.0  # in steps, over all lives that reached a checkpoint
    life_seconds: float = 0.0  # in steps, since this process started
    life_examples: int = 0
    warm_up_seconds: float = 0.0  # of this process, before its first step

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The network's parameters, in a fixed order."""
        return list(self.module.parameters())

    @cached_property
    def norms(self) -> list[models.BatchNorm2d]:
        """The network's BatchNorm layers, in a fixed order."""
        return models.norms(self.module)


def plan_micro_batches(config: Config, world_size: int, has_norm: bool) -> int:
    """Return the number of micro-batches of a step; raise UserError where the config and the world do not fit."""
    wanted, size, limit = config.train.micro_batches, config.train.global_batch_size, config.train.micro_batch_limit
    if not wanted:
        if has_norm:
            raise UserError(
                f"Model {config.model.name} has BatchNorm, so train.micro_batches decides what it learns. "
                "Set it to the largest world size that you want to use, such as --train.micro_batches 8."
            )
        if size < world_size:
            raise UserError(
                f"train.global_batch_size is {size}, fewer than {world_size} ranks. Use {world_size} or more."
            )
        return world_size * (-(-size // (world_size * limit)) if limit else 1)
    if wanted < world_size:
        raise UserError(
            f"{world_size} processes cannot share train.micro_batches {wanted}. Use at most {wanted} processes, "
            f"or --train.micro_batches {2 ** math.ceil(math.log2(world_size))} (another run: it is part of the mathematics)."
        )
    return wanted


def set_up(config: Config, world: World, source: data.Data) -> Run:
    """Build a fresh Run. Collective: every rank must call it."""
    module = models.build(config.model, config.seed)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    module = module.to(device=world.device, memory_format=memory_format)  # type: ignore[call-overload]
    if config.train.compile:
        module.compile()
    micro_batches = plan_micro_batches(config, world.world_size, bool(models.norms(module)))
    size = config.train.global_batch_size
    sampler = Sampler(len(source.train), size, micro_batches, config.seed)
    ema = optim.Ema(module, config.optim.ema) if config.optim.ema else None
    model, optimizer = world.prepare(module, optim.build(config.optim, module))
    if world.world_size > 1:  # the first layer's gradient comes last: what is left of a backward pass then is waiting
        next(module.parameters()).register_post_accumulate_grad_hook(lambda _: world.clock.enter("reduce") and None)
    own = [sampler.own_micro_batches(rank, world.world_size) for rank in range(world.world_size)]
    reducer = ExactTree(model, world, micro_batches, own) if config.train.exact else Allreduce(model, world)
    total_steps = config.train.max_steps or config.train.epochs * sampler.steps_per_epoch
    num_channels = sum(norm.num_features for norm in models.norms(module))
    tables = StepTables(config, sampler, total_steps, num_channels, world.rank, world.world_size, world.device)
    tables.has_scaler = world.accelerator.scaler is not None
    if world.device.type != "cpu":
        tables.hold_lr(optimizer)
    should_record = config.train.cuda_graphs != "off" and not unrecordable(world)
    if should_record:
        leave_default_stream(world.device)
    model.train()
    return Run(
        config,
        world,
        source,
        sampler,
        total_steps,
        model,
        module,
        optimizer,
        ema,
        reducer,
        memory_format,
        tables,
        should_record,
    )


def unrecordable(world: World) -> str:
    """Say why a step cannot be recorded as a CUDA graph here; "" where it can."""
    if world.device.type != "cuda":
        return "no GPU"
    if world.world_size > 1:
        return f"{world.world_size} processes, which exchange gradients in the middle of a step"
    return "fp16, whose scaler waits for the GPU" if world.accelerator.scaler is not None else ""


def is_due(run: Run, every_steps: int, step: int) -> bool:
    """Whether periodic work is due after `step` updates; every_steps 0 means once an epoch. The last step always is."""
    return step % (every_steps or run.sampler.steps_per_epoch) == 0 or step == run.total_steps


def contract(world: World) -> dict[str, Any]:
    """What must stay the same, beside config and data, for the bits to stay the same (docs/exactness.md)."""
    on_gpu = world.device.type == "cuda"
    libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if on_gpu else {}
    return {
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.machine(),
        "num_threads": None if on_gpu else world.num_threads,
        "versions": versions("torch", "accelerate") | libraries,
    }


def make_state(run: Run) -> checkpoint.State:
    """Collect what a checkpoint holds. Collective: every rank must call it."""
    scaler = run.world.accelerator.scaler
    meta = {
        "schema": checkpoint.SCHEMA,
        "step": run.step,
        "mathematics": mathematics(run.config),
        "micro_batches": run.sampler.micro_batches if run.config.train.micro_batches else 0,
        "data_sha256": run.data.sha256,
        "normalization": {"mean": run.data.mean, "std": run.data.std},
        "ledger": dict(zip(("sum", "count"), run.ledger.reduced(run.world), strict=True)),
        "closed_epoch": run.closed_epoch,
        "best": run.best,
        "skips": run.skips,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "contract": contract(run.world),
    }
    ema = checkpoint.model_tensors(run.ema.model) if run.ema else {}
    optimizer = checkpoint.optimizer_tensors(run.optimizer.optimizer, run.module)
    return checkpoint.State(checkpoint.model_tensors(run.module), optimizer, ema, meta)


def restore(run: Run, state: checkpoint.State, source: str) -> list[str]:
    """Put a checkpoint's state into a fresh Run; return warnings. Raises UserError if it belongs to another run."""
    try:
        return _restore(run, state, source)
    except checkpoint.Damaged as error:
        raise checkpoint.Damaged(f"{source}: {error}") from None
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # whole, and yet not what we write
        what = " ".join(str(error).split())[:100]
        raise checkpoint.Damaged(
            f"{source} is not a checkpoint of this program: {type(error).__name__} {what}."
        ) from error


def _restore(run: Run, state: checkpoint.State, source: str) -> list[str]:
    meta = state.meta
    changed = differences(meta["mathematics"], mathematics(run.config))
    if meta["data_sha256"] != run.data.sha256:
        changed.append(f"data {meta['data_sha256'][:12]} -> {run.data.sha256[:12]} ({run.data.name})")
    if changed:
        raise UserError(f"{source} belongs to another run: {', '.join(changed)}. Undo that, or use another run.name.")
    run.step, run.best, run.closed_epoch = meta["step"], meta["best"], meta.get("closed_epoch")
    run.skips = meta.get("skips", 0)
    if not (type(run.step) is int and 0 <= run.step <= run.total_steps):
        raise ValueError(f"step {run.step!r} of {run.total_steps}")
    if run.best is not None:
        run.best = {"step": int(run.best["step"]), "accuracy": float(run.best["accuracy"])}
    checkpoint.restore_model(run.module, state.model)
    if run.ema:
        checkpoint.restore_model(run.ema.model, state.ema)
    checkpoint.restore_optimizer(run.optimizer.optimizer, run.module, state.optimizer)
    if meta["scaler"] is not None and run.world.accelerator.scaler is not None:
        run.world.accelerator.scaler.load_state_dict(meta["scaler"])
    ledger = Ledger(int(meta["ledger"]["sum"]), int(meta["ledger"]["count"]))
    if run.world.is_main:  # the ledger's sum so far counts once over all ranks
        run.ledger = ledger
    differs = contract_differences(meta["contract"], contract(run.world))
    return [f"The bits may differ from an undisturbed run's: {', '.join(differs)}."] if differs else []

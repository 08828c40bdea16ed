"""Deliberate bugs that the checks of a run must catch. A rank gets one before it trains.

Each imitates a bug that trainers in use have or had. Its docstring names them.
"""

import dataclasses
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import train.functional.augment
import train.functional.layers
import train.loop
import train.rundir
import train.state
import train.step
from launch.check.selftest import BATCH
from train.functional import optim, rng
from train.functional.layers import Dropout
from train.functional.sampler import Sampler, share
from train.state import Plan, State
from train.storage import checkpoint
from train.world.reduce import Allreduce, ExactTree

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
_examples = Sampler.examples


# The order of examples


def doubled_example() -> None:
    """Step 5 uses its first example twice and its last one never: a sampler that pads (DistributedSampler)."""

    def examples(self: Sampler, step: int, start: int, stop: int) -> np.ndarray:
        found = _examples(self, step, start, stop)
        if step == 5 and start == 0:
            found[-1] = found[0]
        return found

    Sampler.examples = examples  # type: ignore[method-assign]


def dropped_example() -> None:
    """The first example of step 7 is another epoch's: a resume that skips to the wrong batch (accelerate)."""

    def examples(self: Sampler, step: int, start: int, stop: int) -> np.ndarray:
        found = _examples(self, step, start, stop)
        if step == 7 and start == 0:
            found[0] = _examples(self, step + self.steps_per_epoch, 0, 1)[0]
        return found

    Sampler.examples = examples  # type: ignore[method-assign]


def dropped_tail() -> None:
    """An epoch's last, shorter batch is left out: drop_last=True (torchvision and timm recipes)."""
    Sampler.steps_per_epoch = property(lambda self: self.num_examples // self.global_batch_size)  # type: ignore


def doubled_example_without_coverage_checksum() -> None:
    """As doubled_example, in a trainer that keeps no coverage checksum."""
    doubled_example()

    def close_epoch(plan: Plan, state: State) -> None:
        state.ledger = train.state.Ledger()

    train.loop.close_epoch = close_epoch


def not_reshuffled() -> None:
    """Every epoch has the first one's order: a forgotten set_epoch (pytorch 31771)."""

    def examples(self: Sampler, step: int, start: int, stop: int) -> np.ndarray:
        return _examples(self, step % self.steps_per_epoch, start, stop)

    Sampler.examples = examples  # type: ignore[method-assign]


# Random numbers


def constant_dropout() -> None:
    """Dropout's mask is the same in every step: a generator seeded again in each forward."""
    uniform = rng.uniform

    def constant(keys: Tensor, num: int, salt: int = 0) -> Tensor:
        return uniform(torch.arange(len(keys)), num, salt)

    train.functional.layers.uniform = constant


def constant_augmentation() -> None:
    """Every epoch changes an image in the same way: workers that inherit one NumPy seed (pytorch 5059)."""
    uniform = rng.uniform

    def constant(keys: Tensor, num: int, salt: int = 0) -> Tensor:
        return uniform(torch.arange(len(keys)), num, salt)

    train.functional.augment.uniform = constant


def global_stream_dropout() -> None:
    """Dropout draws from the process's stream, which a resume restarts (every trainer that saves no RNG state)."""

    def forward(self: Dropout, features: Tensor) -> Tensor:
        return F.dropout(features, self.p, self.training)

    Dropout.forward = forward  # type: ignore[method-assign]


def augmentation_by_local_row() -> None:
    """Random numbers are numbered in the rank's share, not in the global batch: the same on all ranks (set_seed)."""
    row_keys, rows = rng.row_keys, BATCH // WORLD_SIZE
    rng.row_keys = lambda key, start, stop, device: row_keys(key, start % rows, start % rows + stop - start, device)


# Gradients, statistics and the update


def plain_allreduce() -> None:
    """Exact mode is requested, but DDP's all-reduce runs: the flag is lost on the way."""
    train.state.ExactTree = lambda model, world, num_leaves, owners: Allreduce(model, world)  # type: ignore


def rank_order_sum() -> None:
    """Partial sums are added rank by rank: deterministic, and yet other bits on another world size."""

    def exchange(self: ExactTree, rows: list[Tensor]) -> Tensor:
        own = torch.stack(rows).sum(0)
        gathered = [torch.empty_like(own) for _ in self.subtrees]
        torch.distributed.all_gather(gathered, own)
        return sum(gathered[1:], start=gathered[0])

    ExactTree._all_gather = exchange  # type: ignore[method-assign]


def mean_of_means() -> None:
    """Micro-batches of unequal size weigh the same: a mean over means (gradient accumulation in transformers, 2024)."""
    loss_sums = train.step._loss_sums

    def weighted(plan: Plan, state: State, part: range, batch: Any) -> Tensor:
        sampler = plan.sampler
        sizes = [stop - start for start, stop in (sampler.micro_batch(batch.step, index) for index in part)]
        mean_size = sampler.batch_rows(batch.step) / sampler.num_micro_batches
        return loss_sums(plan, state, part, batch) * torch.tensor([mean_size / max(size, 1) for size in sizes])

    train.step._loss_sums = weighted


def rank_local_statistics() -> None:
    """BatchNorm averages in only what this rank has seen: DDP without SyncBatchNorm, of which rank 0's are saved."""
    merge = train.functional.layers.merge_statistics

    def local(norms: Any, found: Tensor, shares: Tensor, is_sound: Tensor) -> None:
        own = slice(*share(len(found), WORLD_SIZE, RANK))
        merge(norms, found[own], shares[own] / shares[own].sum(), is_sound)

    train.functional.layers.merge_statistics = local


def clip_by_shard() -> None:
    """Each rank clips by the norm of its own part: torch's clip_grad_norm_ on sharded parameters (FSDP)."""

    def norm_of_own(parameters: list[Tensor]) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients[RANK::WORLD_SIZE])

    optim.grad_norm = norm_of_own  # type: ignore[assignment]


def lr_times_world() -> None:
    """The learning rate grows with the number of processes (accelerate 1382, and every recipe that scales linearly)."""
    lr = optim.lr
    optim.lr = lambda config, step, total_steps: lr(config, step, total_steps) * WORLD_SIZE


# Evaluation


def _change_evaluation(change: Any) -> None:
    evaluate = train.loop.evaluate
    train.loop.evaluate = lambda *arguments: change(evaluate(*arguments))


def padded_evaluation() -> None:
    """The test split is padded to a multiple of the world size (pytorch 25162, Lightning 7929)."""

    def change(result: Any) -> Any:
        padded = math.ceil(result.num_examples / WORLD_SIZE) * WORLD_SIZE
        return dataclasses.replace(result, num_examples=padded, correct=result.correct + padded - result.num_examples)

    _change_evaluation(change)


def evaluation_drops_the_rest() -> None:
    """The test split's last, shorter batch is not evaluated: drop_last in the evaluation's loader."""
    _change_evaluation(
        lambda result: dataclasses.replace(result, num_examples=300, correct=result.correct * 300 // 359)
    )


# Resume


def _after_restore(change: Any) -> None:
    restore = train.loop.restore

    def restored(plan: Plan, state: State, *arguments: Any) -> Any:
        warnings = restore(plan, state, *arguments)
        change(state)
        return warnings

    train.loop.restore = restored


def ema_not_restored() -> None:
    """The average starts again from the resumed weights: it was not in the checkpoint (timm's early EMA)."""
    _after_restore(lambda state: state.ema.model.load_state_dict(state.module.state_dict(), strict=False))


def momentum_not_restored() -> None:
    """The optimizer restarts without state: only the model was saved (the usual tutorial)."""
    checkpoint.restore_optimizer = lambda optimizer, model, tensors: None


def resume_repeats_a_step() -> None:
    """The saved step counts from 0 where the loop counts from 1: one batch is used twice (an off-by-one)."""

    def change(state: State) -> None:
        state.step -= 1

    _after_restore(change)


def oldest_checkpoint() -> None:
    """A resume takes the first checkpoint in a sorted list: names compared as strings (step-99 after step-100)."""
    directories, latest = checkpoint.directories, checkpoint.latest

    def oldest(checkpoints: Path, notify: Any) -> Any:
        checkpoint.directories = lambda path: directories(path)[::-1]
        try:
            return latest(checkpoints, notify)
        finally:
            checkpoint.directories = directories

    checkpoint.latest = oldest


def damage_not_noticed() -> None:
    """A checkpoint is loaded as it is on the disk: there are no checksums (torch.save)."""
    checkpoint.read = lambda path: {file.name: file.read_bytes() for file in path.iterdir()}


def rows_kept_on_resume() -> None:
    """The log continues after the rows of steps that are computed again (wandb, TensorBoard)."""
    train.rundir.RunDir.remove_rows_after = lambda self, step, staging: self.read_rows()


# Checkpoints


def delete_before_write() -> None:
    """The old checkpoint goes before the new one is there: accelerate's total_limit=1."""
    write = checkpoint.write

    def replace(checkpoints: Path, step: int, files: checkpoint.Files, staging: Path) -> Path:
        for old in checkpoint.directories(checkpoints):
            shutil.rmtree(old)
        return write(checkpoints, step, files, staging)

    checkpoint.write = replace


def written_in_place() -> None:
    """A checkpoint has its name before it is whole: a kill leaves a torn one (Lightning 19970)."""

    def write(checkpoints: Path, step: int, files: checkpoint.Files, staging: Path) -> Path:
        final = checkpoints / f"step-{step:08d}"
        final.mkdir(exist_ok=True)
        for name, content in files.items():
            (final / name).write_bytes(content)
        return final

    checkpoint.write = write


def temporary_left() -> None:
    """A save leaves its temporary file next to the checkpoint: disks fill up over the weeks."""
    write = checkpoint.write

    def littering(checkpoints: Path, step: int, files: checkpoint.Files, staging: Path) -> Path:
        (checkpoints / f".writing-{step}").mkdir()
        return write(checkpoints, step, files, staging)

    checkpoint.write = littering


def slow_steps() -> None:
    """Each step takes 20 ms more."""
    import time

    prepare_step = train.loop.prepare_step
    train.loop.prepare_step = lambda *arguments: (time.sleep(0.02), prepare_step(*arguments))[1]  # type: ignore


def other_pixel() -> None:
    """One pixel of the digits is changed. Use it with a cache of its own."""
    import train.storage.data
    from train.storage.arrays import Arrays

    read_digits = train.storage.data.read_digits

    def changed() -> Arrays:
        digits = read_digits()
        digits.tensors["train_images"][7, 14, 14] ^= 1
        return digits

    train.storage.data.read_digits = changed

"""The tables that steps read and write on the device: a row per step, filled ahead of time and read later.

Invariant: everything that changes from one step to the next is in the row at `place`, which is a tensor on the device too.
The device's work is therefore the same in every step, so a CUDA graph can repeat it, and no step waits for the host.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.config import Config
from train.functional import optim
from train.functional.hashing import key
from train.functional.sampler import Sampler

MOST_ROWS, MOST_STEPS = 1 << 17, 4096  # of the global batches in a stretch, and its steps


class StepStatistics:
    """The numbers of the current step, as named views of one float64 tensor [M + 2, 2 + 2 * channels] for M micro-batches.

    A rank fills in what it computes itself and leaves zeros elsewhere. Adding zeros is exact, so the sum over the ranks has
    the same bits on any world size.
    """

    def __init__(self, num_micro_batches: int, num_channels: int, world_size: int, device: torch.device) -> None:
        table = torch.zeros(num_micro_batches + 2, 2 + 2 * num_channels, dtype=torch.float64, device=device)
        self.loss_sums = table[:-2, 0]  # [M]
        self.rank_seconds = table[:world_size, 1]  # [W]; there are at least as many micro-batches as ranks
        self.batch_norms = table[:-2, 2:]  # [M, 2 * channels]: the means of all layers, then their variances
        self.stop_flags = table[-2, 0]  # []: how many ranks were asked to stop
        self.summed = table[:-1]  # what the ranks add up: all of the above
        self.loss, self.grad_norm = table[-1, 0], table[-1, 1]  # [] each
        self.result = table[:, :2]  # what is kept of it, [M + 2, 2]


@dataclass(frozen=True)
class StepResult:
    """The numbers of one step, on the host."""

    step: int  # the first one is 1
    loss: float  # per example
    grad_norm: float
    is_sound: bool  # otherwise one of them is not finite, and the update was left out
    loss_sums: list[float]  # of each micro-batch
    rank_seconds: list[float]  # of each rank's own work; not measured with one rank
    stop_flags: int  # how many ranks were asked to stop; not used with one rank


def shares(num_examples: int, num_micro_batches: int, device: torch.device) -> Tensor:
    """Return the share of the examples that each micro-batch has, float32 [M], as `Sampler.micro_batch` cuts."""
    counts = (torch.arange(num_micro_batches + 1, device=device) * num_examples // num_micro_batches).diff().float()
    return counts / counts.sum()


class StepTables:
    """The tables of one rank. They hold a stretch: consecutive steps of one epoch."""

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        total_steps: int,
        num_channels: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.config, self.sampler, self.total_steps, self.device = config, sampler, total_steps, device
        self.rank, self.world_size = rank, world_size
        self.statistics = StepStatistics(sampler.micro_batches, num_channels, world_size, device)
        self.has_keys = config.augment.is_on or config.model.dropout > 0
        start, stop = sampler.rank_rows(0, rank, world_size)
        # the same on all ranks: they wait for each other at the end of a stretch
        size = min(sampler.steps_per_epoch, MOST_STEPS, max(1, MOST_ROWS // sampler.global_batch_size))
        self.start = self.stop = 0  # the stretch is the steps [start, stop), counted from 0; none yet
        self.examples: list[NDArray[np.int64]] = []  # of this rank, a step each
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.rows = torch.zeros(
            size, max(stop - start, 1), dtype=torch.int64, device=device
        )  # the examples of whole batches
        self.short_rows = torch.zeros(
            1, dtype=torch.int64, device=device
        )  # of an epoch's last batch, where it is smaller
        self.keys = torch.zeros(size, 2, dtype=torch.int64, device=device)  # of augmentation and dropout
        self.lrs = torch.zeros(size, device=device)
        self.lr: Tensor | None = None  # float32 [1]: the current step's; None: the host sets the optimizer's
        self.has_scaler = False  # whether fp16's scaler judges the gradients
        self.loss_scale = 1.0  # what undoes DDP's division by the world size
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}  # by size of a batch; graphs hold their addresses
        self.results = torch.zeros(size, sampler.micro_batches + 2, 2, dtype=torch.float64, device=device)

    def hold_lr(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer read its learning rate on the device, where `next_lr` puts it."""
        self.lr = torch.zeros(1, device=self.device)
        for group in optimizer.param_groups:
            group["lr"] = self.lr[0]

    def next_lr(self) -> None:
        """Copy the current step's learning rate to where the optimizer reads it."""
        if self.lr is not None:
            torch.index_select(self.lrs, 0, self.place, out=self.lr)

    def weights(self, num_examples: int) -> tuple[Tensor, Tensor]:
        """Return what a batch's summed loss is multiplied by, float32 [], and its micro-batches' shares, float32 [M].

        Made once for each size of a batch.
        """
        if num_examples not in self._weights:
            weight = torch.full((), self.loss_scale / num_examples, device=self.device)
            self._weights[num_examples] = weight, shares(num_examples, self.sampler.micro_batches, self.device)
        return self._weights[num_examples]

    def found_inf(self) -> Tensor:
        """Return 1 if the current step's loss or gradient norm is not finite, else 0; float32 []."""
        loss, grad_norm = self.statistics.loss, self.statistics.grad_norm
        total = loss if self.has_scaler else loss + grad_norm
        return torch.ne(total * 0, 0, out=torch.empty((), device=self.device))

    def fill(self, step: int) -> None:
        """Start a stretch at `step`: compute its rows on the host and send them to the device, without waiting for it."""
        sampler, config = self.sampler, self.config
        end = (step // sampler.steps_per_epoch + 1) * sampler.steps_per_epoch
        self.start, self.stop = step, min(end, step + len(self.rows), self.total_steps)
        steps = range(self.start, self.stop)
        self.examples = [sampler.rank_examples(each, self.rank, self.world_size) for each in steps]
        whole = [examples for each, examples in zip(steps, self.examples, strict=True) if sampler.is_whole(each)]
        if whole:
            self._send(self.rows, np.stack(whole))
        if len(whole) < len(steps):
            last = (
                self.examples[-1] if len(self.examples[-1]) else np.zeros(1, np.int64)
            )  # a rank without rows uses a dummy
            self.short_rows = torch.zeros(len(last), dtype=torch.int64, device=self.device)
            self._send(self.short_rows, last)
        if self.has_keys:
            keys = [[key(config.seed, purpose, each) for purpose in ("augment", "dropout")] for each in steps]
            self._send(self.keys, np.array(keys, np.uint64).view(np.int64))
        if self.lr is not None:
            self._send(
                self.lrs, np.array([optim.lr(config.optim, each, self.total_steps) for each in steps], np.float32)
            )
        self.place.zero_()

    def _send(self, table: Tensor, values: NDArray) -> None:
        tensor = torch.from_numpy(values)
        table[: len(tensor)].copy_(tensor.pin_memory() if self.device.type == "cuda" else tensor, non_blocking=True)

    def keep(self) -> None:
        """Write the current step's result into its row and advance to the next row."""
        self.results.index_copy_(0, self.place, self.statistics.result[None])
        self.place.add_(1)

    def fetch(self, first: int, last: int) -> Tensor:
        """Return the results of the steps first + 1 to last, float64 [n, M + 2, 2], on the host.

        A GPU copies them in its own time: wait for it before `decode`.
        """
        return self.results[first - self.start : last - self.start].to("cpu", non_blocking=True)

    def decode(self, first: int, results: Tensor) -> list[StepResult]:
        """Return the results of the steps after `first` from what `fetch` returned."""
        found = []
        for step, (*parts, (stop_flags, _), (loss, grad_norm)) in enumerate(results.tolist(), first + 1):
            # fp16 overflows while it finds its scale; the scaler leaves such updates out itself
            is_sound = math.isfinite(loss if self.has_scaler else loss + grad_norm)
            loss_sums, seconds = [row[0] for row in parts], [row[1] for row in parts[: self.world_size]]
            found.append(StepResult(step, loss, grad_norm, is_sound, loss_sums, seconds, int(stop_flags)))
        return found

    def read(self, first: int, last: int) -> list[StepResult]:
        """Return the results of the steps first + 1 to last of this stretch. A host-device sync: call it where one is due."""
        return self.decode(first, self.results[first - self.start : last - self.start].cpu())

"""The tables on the device from which steps read their inputs and into which they write their results, a row per step.

Invariant: everything that changes from one step to the next is in row `row_index`, which is itself a tensor on the
device. The device's work is therefore the same in every step. A CUDA graph can repeat it, and no step waits for the
host.
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

MAX_EXAMPLES, MAX_STEPS = 1 << 17, 4096  # of a stretch


class StepStatistics:
    """The numbers of the current step: named views of one float64 tensor [M + 2, 2 + 2 * channels] for M micro-batches.

    A rank writes the numbers that it computes and leaves zeros elsewhere. Adding zeros is exact, so the sum over the
    ranks has the same bits on any world size.
    """

    def __init__(self, num_micro_batches: int, num_channels: int, world_size: int, device: torch.device) -> None:
        table = torch.zeros(num_micro_batches + 2, 2 + 2 * num_channels, dtype=torch.float64, device=device)
        self.loss_sums = table[:-2, 0]  # [M]
        self.rank_seconds = table[:world_size, 1]  # [W], where W <= M
        self.batch_norms = table[:-2, 2:]  # [M, 2 * channels]: the means of all layers, then the variances
        self.stop_flags = table[-2, 0]  # []: the number of ranks that were asked to stop
        self.summed = table[:-1]  # all of the above, which the ranks sum up
        self.loss, self.grad_norm = table[-1, 0], table[-1, 1]  # [] each
        self.result = table[:, :2]  # [M + 2, 2]: all but the batch norms


@dataclass(frozen=True)
class StepResult:
    """The numbers of one step, on the host."""

    step: int  # the first one is 1
    loss: float  # per example
    grad_norm: float
    is_sound: bool  # if not, loss or gradient norm is not finite, and the update was skipped
    loss_sums: list[float]  # of each micro-batch
    rank_seconds: list[float]  # of each rank's own work; 0 with one rank
    stop_flags: int  # the number of ranks that were asked to stop; 0 with one rank


def shares(num_examples: int, num_micro_batches: int, device: torch.device) -> Tensor:
    """Return each micro-batch's share of the examples, float32 [M], with the bounds of `Sampler.micro_batch`."""
    counts = (torch.arange(num_micro_batches + 1, device=device) * num_examples // num_micro_batches).diff().float()
    return counts / counts.sum()


class StepTables:
    """The tables of one rank for a stretch: consecutive steps of one epoch."""

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        total_steps: int,
        num_channels: int,
        rank: int,
        world_size: int,
        device: torch.device,
        *,
        loss_scale: float,
        has_dropout: bool,
        has_scaler: bool,
    ) -> None:
        self.config, self.sampler, self.total_steps, self.device = config, sampler, total_steps, device
        self.rank, self.world_size = rank, world_size
        num_micro_batches = sampler.num_micro_batches
        self.statistics = StepStatistics(num_micro_batches, num_channels, world_size, device)
        self.has_keys = config.augment.is_on or has_dropout
        self.loss_scale = loss_scale  # undoes DDP's division by the world size
        self.has_scaler = has_scaler  # whether fp16's scaler checks the gradients
        self._loss_weights: dict[int, tuple[Tensor, Tensor]] = {}  # by batch size; CUDA graphs hold their addresses

        # The same on all ranks, which wait for each other at the end of a stretch.
        size = min(sampler.steps_per_epoch, MAX_STEPS, max(1, MAX_EXAMPLES // sampler.global_batch_size))
        self.start = self.stop = 0  # the stretch is the steps [start, stop), counted from 0; empty at first
        self.examples: list[NDArray[np.int64]] = []  # of this rank, by step
        # With uneven shares a rank may have more rows of an epoch's shorter last batch than of a whole one.
        bounds = [sampler.rank_rows(step, rank, world_size) for step in (0, sampler.steps_per_epoch - 1)]
        width = max(1, *(stop - start for start, stop in bounds))

        self.row_index = torch.zeros(1, dtype=torch.int64, device=device)
        # Examples. A rank without any computes one, with weight 0.
        self.rows = torch.zeros(size, width, dtype=torch.int64, device=device)
        self.keys = torch.zeros(size, 2, dtype=torch.int64, device=device)  # of augmentation and dropout
        self.lrs = torch.zeros(size, device=device)
        self.lr: Tensor | None = None  # float32 [1], of the current step; None if the host sets the optimizer's
        self.results = torch.zeros(size, num_micro_batches + 2, 2, dtype=torch.float64, device=device)

    def keep_lr_on_device(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer read its learning rate from a tensor, which `load_lr` updates."""
        self.lr = torch.zeros(1, device=self.device)
        for group in optimizer.param_groups:
            group["lr"] = self.lr[0]

    def load_lr(self) -> None:
        """Copy the current step's learning rate to where the optimizer reads it, if that is on the device."""
        if self.lr is not None:
            torch.index_select(self.lrs, 0, self.row_index, out=self.lr)

    def loss_weights(self, num_examples: int) -> tuple[Tensor, Tensor]:
        """Return the factor of a batch's summed loss, float32 [], and its micro-batches' shares, float32 [M].

        They are made once for each batch size.
        """
        if num_examples not in self._loss_weights:
            weight = torch.full((), self.loss_scale / num_examples, device=self.device)
            self._loss_weights[num_examples] = weight, shares(num_examples, self.sampler.num_micro_batches, self.device)
        return self._loss_weights[num_examples]

    def found_inf(self) -> Tensor:
        """Return 1 if the current step's loss or gradient norm is not finite, else 0, float32 [].

        Torch's fused optimizers skip an update whose `found_inf` is 1.
        """
        loss, grad_norm = self.statistics.loss, self.statistics.grad_norm
        total = loss if self.has_scaler else loss + grad_norm
        return torch.ne(total * 0, 0, out=torch.empty((), device=self.device))

    def fill(self, step: int) -> None:
        """Start a stretch at `step`: compute its rows on the host and send them to the device without waiting."""
        sampler, config = self.sampler, self.config
        epoch_end = (step // sampler.steps_per_epoch + 1) * sampler.steps_per_epoch
        self.start, self.stop = step, min(epoch_end, step + len(self.rows), self.total_steps)
        steps = range(self.start, self.stop)
        self.examples = [sampler.rank_examples(each, self.rank, self.world_size) for each in steps]
        rows = np.zeros((len(steps), self.rows.shape[1]), np.int64)
        for row, examples in zip(rows, self.examples, strict=True):
            row[: len(examples)] = examples
        self._send(self.rows, rows)
        if self.has_keys:
            keys = [[key(config.seed, purpose, each) for purpose in ("augment", "dropout")] for each in steps]
            self._send(self.keys, np.array(keys, np.uint64).view(np.int64))
        if self.lr is not None:
            lrs = [optim.lr(config.optim, each, self.total_steps) for each in steps]
            self._send(self.lrs, np.array(lrs, np.float32))
        self.row_index.zero_()

    def _send(self, table: Tensor, values: NDArray) -> None:
        tensor = torch.from_numpy(values)
        table[: len(tensor)].copy_(tensor.pin_memory() if self.device.type == "cuda" else tensor, non_blocking=True)

    def store_result(self) -> None:
        """Write the current step's result into its row and advance to the next row."""
        self.results.index_copy_(0, self.row_index, self.statistics.result[None])
        self.row_index.add_(1)

    def fetch_results(self, first: int, last: int) -> Tensor:
        """Return the results of steps first + 1 to last, float64 [n, M + 2, 2], on the host.

        A GPU copies them asynchronously: wait for it before `decode_results`.
        """
        return self.results[first - self.start : last - self.start].to("cpu", non_blocking=True)

    def decode_results(self, first: int, results: Tensor) -> list[StepResult]:
        """Return the results of the steps after `first`, as fetched by `fetch_results`."""
        decoded = []
        for step, (*parts, (stop_flags, _), (loss, grad_norm)) in enumerate(results.tolist(), first + 1):
            # The gradients overflow while fp16's scaler finds its scale; the scaler then skips the update itself.
            is_sound = math.isfinite(loss if self.has_scaler else loss + grad_norm)
            loss_sums, seconds = [row[0] for row in parts], [row[1] for row in parts[: self.world_size]]
            decoded.append(StepResult(step, loss, grad_norm, is_sound, loss_sums, seconds, int(stop_flags)))
        return decoded

    def read_results(self, first: int, last: int) -> list[StepResult]:
        """Return the results of steps first + 1 to last of this stretch, after waiting for the device."""
        return self.decode_results(first, self.results[first - self.start : last - self.start].cpu())

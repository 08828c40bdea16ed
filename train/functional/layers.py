"""Dropout and BatchNorm whose results do not depend on who computes them. `convert` puts them in place of torch's.

What a training pass needs comes in through `one_pass`: a key per example, from which all randomness follows, and the
sizes of the micro-batches. Batch statistics go out through `BatchNorm.batch_mean` and `batch_var`, so that a step can
merge those of its micro-batches in one fixed order.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.errors import UserError
from train.functional.rng import uniform

BY_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Dropout(nn.modules.dropout._DropoutNd):
    """Dropout (Srivastava et al., 2014) whose mask is a function of the examples' keys, the layer and the call."""

    keys: Tensor | None = None  # of the current pass: int64 [B]
    call = 0  # the next one of the pass: each layer has 2**16 of them
    is_by_channel = False

    def forward(self, input: Tensor) -> Tensor:
        """Drop features of float [n * B,...] in training, or whole channels of [n * B,C,...] if `is_by_channel`.

        The rows of an example must be next to each other. Raises UserError if B does not divide the first dimension.
        """
        if not self.training or self.p == 0:
            return input
        if self.keys is None:
            what = "A dropout layer was called outside of a training step's forward pass"
            raise RuntimeError(f"{what}. Activation checkpointing does that, in the backward pass.")
        rows_per_example(input, len(self.keys))
        shape = (*input.shape[:2], *[1] * (input.dim() - 2)) if self.is_by_channel else input.shape
        salt = self.call << 32  # of the columns of a row's random numbers, each call has 2**32
        self.call += 1
        kept = uniform(self.keys, math.prod(shape) // len(self.keys), salt).view(shape) >= self.p
        return input * kept * (1 / (1 - self.p) if self.p < 1 else 0)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm (Ioffe and Szegedy, 2015) over each micro-batch of a pass (ghost BatchNorm; Hoffer et al., 2017).

    It stores the micro-batches' means and unbiased variances, float32 [G,C] each, of the last call in a pass.
    `merge_statistics` updates the running ones once per step, the same on any world size.
    """

    momentum: float
    batch_mean: Tensor
    batch_var: Tensor
    sizes: list[int] | None = None  # of the current pass's micro-batches, in examples; None: it is one

    def forward(self, input: Tensor) -> Tensor:
        """Normalize float [n * B,C,...] by the micro-batches' statistics in training, by the running ones otherwise.

        The rows of an example must be next to each other. Raises UserError if B does not divide the first dimension.
        """
        affine = self.weight, self.bias
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, *affine, False, self.momentum, self.eps)
        sizes = self.sizes or [len(input)]
        num_rows = rows_per_example(input, sum(sizes))
        statistics = torch.zeros(2, len(sizes), self.num_features, device=self.batch_mean.device)
        self.batch_mean, self.batch_var = statistics
        if len(sizes) == 1:
            return self._normalize(input, self.batch_mean[0], self.batch_var[0], *affine)
        parts = input.split([num_rows * size for size in sizes])
        # One operation then adds up the gradients of all micro-batches.
        copies = [[None] * len(sizes) if each is None else each.expand(len(sizes), -1).unbind() for each in affine]
        return torch.cat([self._normalize(*part) for part in zip(parts, *statistics, *copies, strict=True)])

    def _normalize(
        self, input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Normalize a micro-batch by its statistics, and write them to `mean` and `variance`, float32 [C]."""
        if not len(input):
            return input
        if input.numel() == self.num_features:  # a single value has no unbiased variance; two equal ones have 0
            return self._normalize(input.expand(2, *input.shape[1:]), mean, variance, weight, bias)[:1]
        return F.batch_norm(input, mean, variance, weight, bias, True, 1.0, self.eps)


def rows_per_example(input: Tensor, num_examples: int) -> int:
    """Return how many rows of a layer's input belong to one example. Raises UserError if that is not a whole number."""
    if len(input) % num_examples:
        raise UserError(f"A layer got {len(input)} rows for {num_examples} examples. Put the batch first.")
    return len(input) // num_examples


def convert(model: nn.Module) -> nn.Module:
    """Turn torch's Dropout and BatchNorm layers of any dimension into ours, in place; return the model.

    Raises UserError for a BatchNorm without running statistics or without a fixed momentum.
    """
    for name, layer in model.named_modules():
        kind: Any = type(layer)
        if kind is nn.Dropout or kind in BY_CHANNEL:
            layer.__class__ = Dropout
            layer.is_by_channel = kind in BY_CHANNEL
        elif kind in BATCH_NORMS:
            if layer.momentum is None or not layer.track_running_stats:
                options = "momentum=None or track_running_stats=False"
                raise UserError(f"{name} is {kind.__name__} with {options}. Leave that option out.")
            layer.__class__ = BatchNorm
            layer.num_batches_tracked = None  # not used: momentum is fixed
            for buffer in ("batch_mean", "batch_var"):
                layer.register_buffer(buffer, torch.zeros_like(layer.running_mean)[None], persistent=False)
    return model


def dropouts(model: nn.Module) -> list[Dropout]:
    """Return the model's dropout layers that drop anything, in a fixed order."""
    return [layer for layer in model.modules() if isinstance(layer, Dropout) and layer.p > 0]


@contextmanager
def one_pass(
    dropouts: list[Dropout], batch_norms: list[BatchNorm], keys: Tensor | None, sizes: list[int]
) -> Iterator[None]:
    """Give a model's layers what the training pass inside needs.

    That is the examples' keys, int64 [B], and the sizes of the micro-batches that they fill in order.
    """
    for number, dropout in enumerate(dropouts):
        dropout.keys, dropout.call = keys, number << 16
    for norm in batch_norms:
        norm.sizes = sizes
    yield
    for dropout in dropouts:
        dropout.keys = None
    for norm in batch_norms:
        norm.sizes = None


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """Return the BatchNorm layers that are in training mode, in a fixed order. The others are frozen."""
    return [layer for layer in model.modules() if isinstance(layer, BatchNorm) and layer.training]


def batch_statistics(layers: list[BatchNorm]) -> Tensor:
    """Return the last training pass's statistics, float32 [G, 2 * channels]: all layers' means, then the variances."""
    return torch.cat([*(layer.batch_mean for layer in layers), *(layer.batch_var for layer in layers)], dim=1)


def merge_statistics(layers: list[BatchNorm], found: Tensor, shares: Tensor, is_sound: Tensor) -> None:
    """Update the running statistics of all layers from M micro-batches.

    `found`, float32 [M, 2 * channels], holds the means of all layers, then the variances; `shares`, float32 [M], each
    micro-batch's share of the examples. If `is_sound`, bool [], is false, nothing changes. The variance of the union
    is the mean of the variances plus the variance of the means. That is exact for biased variances, and off by a
    share of at most M / (B * H * W) for unbiased ones.
    """
    widths = [layer.num_features for layer in layers]
    running: list[Any] = [layer.running_mean for layer in layers] + [layer.running_var for layer in layers]

    def sum_rows(values: Tensor) -> Tensor:  # layer by layer, because a tensor's width can change the order of addition
        return torch.cat([part.sum(0) for part in values.split(widths, dim=1)])

    means, variances = found.chunk(2, dim=1)
    mean = sum_rows(shares[:, None] * means)
    variance = sum_rows(shares[:, None] * (variances + (means - mean) ** 2))
    merged = torch.where(is_sound, torch.cat((mean, variance)), torch.cat(running))
    momentum: Any = [layer.momentum for layer in layers] * 2
    torch._foreach_lerp_(running, merged.split(widths * 2), momentum)

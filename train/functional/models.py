"""The CNNs: inputs float [B,1,28,28] -> logits float [B,10]. Nothing here depends on ranks, devices or precision.

All randomness of a forward pass comes in through `keys`, one per example. Batch statistics go out through
`BatchNorm2d.batch_mean` and `batch_var`, so that a step can merge those of its micro-batches in one fixed order.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import ModelConfig
from train.functional.hashing import key
from train.functional.rng import uniform

NUM_CLASSES = 10


class Dropout(nn.Module):
    """Dropout (Srivastava et al., 2014) whose mask is a function of the examples' keys. Without keys it is off."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, features: Tensor, keys: Tensor | None) -> Tensor:
        """Drop some of the features, float [B,F], if keys, int64 [B], are given."""
        if keys is None or self.probability == 0:
            return features
        kept = uniform(keys, features.shape[1]) >= self.probability
        return features * kept * (1 / (1 - self.probability))


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm (Ioffe and Szegedy, 2015) that stores a training pass's statistics instead of averaging them in.

    A training pass normalizes by its own micro-batch and stores mean and unbiased variance, float32 [C] each, in
    `batch_mean` and `batch_var`. `merge_statistics` updates the running ones once per step, the same on any world size.
    """

    batch_mean: Tensor
    batch_var: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.num_batches_tracked = None  # not used: momentum is fixed
        self.register_buffer("batch_mean", torch.zeros(num_features), persistent=False)
        self.register_buffer("batch_var", torch.ones(num_features), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize float [B,C,H,W] by the micro-batch's statistics in training, by the running ones otherwise."""
        if not self.training:
            return super().forward(input)
        self.batch_mean, self.batch_var = torch.zeros(2, self.num_features, device=self.batch_mean.device)
        return F.batch_norm(input, self.batch_mean, self.batch_var, self.weight, self.bias, True, 1.0, self.eps)


class Cnn(nn.Module):
    """The classic MNIST CNN: convolution, pooling, convolution, pooling, two fully connected layers.

    It has 215,194 parameters with the default widths. `docs/model.md` walks through its layers.
    """

    def __init__(self, widths: tuple[int, int] = (24, 32), hidden: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], 5)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3)
        self.fc1 = nn.Linear(widths[1] * 5 * 5, hidden)
        self.dropout = Dropout(dropout)
        self.fc2 = nn.Linear(hidden, NUM_CLASSES)

    def forward(self, inputs: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return logits float [B,10] of inputs float [B,1,28,28]; keys int64 [B] switch dropout on."""
        features = F.max_pool2d(F.relu(self.conv1(inputs)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        features = F.relu(self.fc1(features.flatten(1)))
        return self.fc2(self.dropout(features, keys))


class Vgg(nn.Module):
    """A chain of convolutions with BatchNorm (after VGG; Simonyan and Zisserman, 2014) and one linear layer.

    `layers` lists (width, kernel, padding, has_pool). Pooling comes before BatchNorm and ReLU, which then cost a
    quarter. Max pooling commutes with ReLU.
    """

    def __init__(self, layers: tuple[tuple[int, int, int, bool], ...], dropout: float = 0.0) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        channels, side = 1, 28
        for width, kernel, padding, has_pool in layers:
            modules += [nn.Conv2d(channels, width, kernel, padding=padding, bias=False)]
            modules += [nn.MaxPool2d(2)] if has_pool else []
            modules += [BatchNorm2d(width), nn.ReLU()]
            channels, side = width, (side + 2 * padding - kernel + 1) // (2 if has_pool else 1)
        self.features = nn.Sequential(*modules)
        self.dropout = Dropout(dropout)
        self.fc = nn.Linear(channels * side * side, NUM_CLASSES)

    def forward(self, inputs: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return logits float [B,10] of inputs float [B,1,28,28]; keys int64 [B] switch dropout on."""
        return self.fc(self.dropout(self.features(inputs).flatten(1), keys))


def vgg(widths: tuple[int, int, int, int, int], dropout: float) -> Vgg:
    """Build the five convolutions that both accurate models share."""
    kernels, paddings, has_pool = (5, 3, 3, 3, 3), (0, 0, 0, 1, 1), (True, False, True, False, True)
    return Vgg(tuple(zip(widths, kernels, paddings, has_pool, strict=True)), dropout)


MODELS: dict[str, Callable[[float], nn.Module]] = {
    "cnn": lambda dropout: Cnn(dropout=dropout),
    "vgg": lambda dropout: vgg((32, 48, 64, 96, 128), dropout),
    "vgg_wide": lambda dropout: vgg((64, 96, 128, 192, 256), dropout),
    "tiny": lambda dropout: Cnn((4, 8), 16, dropout),
    "tiny_bn": lambda dropout: Vgg(((4, 3, 1, True), (8, 3, 1, True), (16, 3, 1, True)), dropout),
}


def build(config: ModelConfig, seed: int) -> nn.Module:
    """Build the model on the CPU, with torch's default initialization drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "init") % 2**63)
        return MODELS[config.name](config.dropout)


def batch_norms(model: nn.Module) -> list[BatchNorm2d]:
    """Return the model's BatchNorm layers, in a fixed order."""
    return [module for module in model.modules() if isinstance(module, BatchNorm2d)]


def batch_statistics(layers: list[BatchNorm2d]) -> Tensor:
    """Return the last training pass's statistics, float32 [2 * channels]: all layers' means, then the variances."""
    return torch.cat([*(layer.batch_mean for layer in layers), *(layer.batch_var for layer in layers)])


def merge_statistics(layers: list[BatchNorm2d], found: Tensor, shares: Tensor, is_sound: Tensor) -> None:
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
    momentum: Any = layers[0].momentum
    torch._foreach_lerp_(running, merged.split(widths * 2), momentum)

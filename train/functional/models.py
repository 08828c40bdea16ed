"""The built-in CNNs: inputs float [B,C,H,W] -> logits float [B,K], for images of any shape that is large enough.

They are plain modules. `build` makes their dropout and BatchNorm layers ours (`layers.py`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import ModelConfig
from train.errors import UserError
from train.functional.hashing import key
from train.functional.layers import convert

Shape = tuple[int, int, int]  # of an image: channels, height, width
Layer = tuple[int, int, int, bool]  # of a Vgg: width, kernel, padding, has_pool


class Cnn(nn.Module):
    """The classic MNIST CNN: convolution, pooling, convolution, pooling, two fully connected layers.

    With the default widths it has 215,194 parameters on MNIST. `docs/model.md` walks through its layers.
    """

    def __init__(self, shape: Shape, num_classes: int, dropout: float, widths: Sequence[int] = (24, 32, 256)) -> None:
        super().__init__()
        rows, columns = (((side - 4) // 2 - 2) // 2 for side in shape[1:])
        self.conv1 = nn.Conv2d(shape[0], widths[0], 5)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3)
        self.fc1 = nn.Linear(widths[1] * rows * columns, widths[2])
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(widths[2], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits float [B,K] of inputs float [B,C,H,W]."""
        features = F.max_pool2d(F.relu(self.conv1(inputs)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        features = F.relu(self.fc1(features.flatten(1)))
        return self.fc2(self.dropout(features))


class Vgg(nn.Module):
    """A chain of convolutions with BatchNorm (after VGG; Simonyan and Zisserman, 2014) and one linear layer.

    Pooling comes before BatchNorm and ReLU, which then cost a quarter. Max pooling commutes with ReLU.
    """

    def __init__(self, shape: Shape, num_classes: int, dropout: float, layers: Sequence[Layer]) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        channels, *sides = shape
        for width, kernel, padding, has_pool in layers:
            modules += [nn.Conv2d(channels, width, kernel, padding=padding, bias=False)]
            modules += [nn.MaxPool2d(2)] if has_pool else []
            modules += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
            sides = [(side + 2 * padding - kernel + 1) // (2 if has_pool else 1) for side in sides]
        self.features = nn.Sequential(*modules)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels * sides[0] * sides[1], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits float [B,K] of inputs float [B,C,H,W]."""
        return self.fc(self.dropout(self.features(inputs).flatten(1)))


def five(*widths: int) -> list[Layer]:
    """Return the five convolutions that both accurate models share."""
    return list(zip(widths, (5, 3, 3, 3, 3), (0, 0, 0, 1, 1), (True, False, True, False, True), strict=True))


MODELS: dict[str, tuple[int, Callable[[Shape, int, float], nn.Module]]] = {  # the least side of an image, in pixels
    "cnn": (12, Cnn),
    "vgg": (20, partial(Vgg, layers=five(32, 48, 64, 96, 128))),
    "vgg_wide": (20, partial(Vgg, layers=five(64, 96, 128, 192, 256))),
    "tiny": (12, partial(Cnn, widths=(4, 8, 16))),
    "tiny_bn": (8, partial(Vgg, layers=((4, 3, 1, True), (8, 3, 1, True), (16, 3, 1, True)))),
}


def build(config: ModelConfig, shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """Build a built-in model on the CPU, with torch's default initialization drawn from `seed` alone.

    Raises UserError if images of `shape` are too small for it.
    """
    least, make = MODELS[config.name]
    if min(shape[1:]) < least:
        needed = f"model.name {config.name} needs images of at least {least} x {least} pixels"
        raise UserError(f"{needed}, got {shape[1]} x {shape[2]}. Use larger images, or --model.name FILE.py:FUNCTION.")
    with drawing_from(seed):
        return convert(make(shape, num_classes, config.dropout))


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Draw initial weights inside from `seed` alone, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "init") % 2**63)
        yield

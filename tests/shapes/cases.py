"""Data of many shapes, each with a network and with what else a run on them needs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT
from torch import Tensor

from train.storage.arrays import Arrays, write

OWN = Path(__file__).with_name("networks.py")
VIT = f"{ROOT / 'configs' / 'networks' / 'vit.py'}:build"


@dataclass(frozen=True)
class Case:
    """Images of a shape, [H,W] or [H,W,3], and a network that is trained on them in 8 micro-batches."""

    name: str
    shape: tuple[int, ...]
    num_classes: int
    num_train: int
    num_test: int
    network: str
    global_batch_size: int
    num_epochs: int = 1
    flags: str = ""
    num_validation: int = 0
    suffix: str = ".npz"
    world_sizes: tuple[int, ...] = (2, 3)  # of the default run, in addition to 1

    @property
    def num_steps(self) -> int:
        """The steps of a run."""
        return self.num_epochs * -(-self.num_train // self.global_batch_size)

    @property
    def num_evaluated(self) -> int:
        """The examples of the split that a run evaluates."""
        return self.num_validation or self.num_test

    def file(self, folder: Path) -> Path:
        """Return the file of the data in a folder."""
        return folder / f"{self.name}{self.suffix}"

    def arguments(self, folder: Path) -> str:
        """Return the options of a run on the data in a folder."""
        return (
            f"--data.name {self.file(folder)} --model.name {self.network} --train.num_micro_batches 8 "
            f"--train.global_batch_size {self.global_batch_size} --train.epochs {self.num_epochs} --optim.lr 0.05 "
            f"--eval.every_steps 99 --log.every_steps 1 {self.flags}"
        )

    def write(self, folder: Path) -> None:
        """Write the data: with safetensors or, as a user would, with numpy."""
        tensors: dict[str, Tensor] = {}
        sizes = {"train": self.num_train, "test": self.num_test, "validation": self.num_validation}
        for seed, (split, size) in enumerate(sizes.items()):
            if size:
                tensors[f"{split}_images"], tensors[f"{split}_labels"] = self.draw(size, seed)
        path, class_names = self.file(folder), [f"no. {n}" for n in range(self.num_classes)]
        if self.suffix == ".safetensors":
            write(path, Arrays(tensors, class_names))
        else:
            np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()}, class_names=class_names)

    def draw(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return images uint8 [N,*shape] and labels int64 [N]: a pattern for each class, and noise."""
        labels = self.draw_labels(size, seed)
        patterns = np.random.default_rng(99).integers(0, 156, (self.num_classes, *self.shape), dtype=np.uint8)
        noise = np.random.default_rng(seed).integers(0, 100, (size, *self.shape), dtype=np.uint8)
        return torch.from_numpy(patterns[labels] + noise), labels

    def draw_labels(self, size: int, seed: int) -> Tensor:
        """Return labels int64 [N], with all classes, in a random order."""
        return torch.from_numpy(np.random.default_rng(seed).permutation(size) % self.num_classes)


CASES = [
    Case(
        *("grey-28x28-cnn", (28, 28), 10, 300, 90, "cnn", 64),
        flags="--augment.shift 2 --augment.rotate 10 --model.dropout 0.2",
        world_sizes=(3, 8),
    ),
    Case(
        *("colour-32x32-vgg", (32, 32, 3), 10, 100, 40, "vgg", 40, 3),
        flags="--augment.flip 0.5 --optim.ema 0.5",
        world_sizes=(3, 4),
    ),
    Case(
        *("colour-32x32-resnet18", (32, 32, 3), 37, 75, 37, f"{OWN}:resnet18", 40),
        flags="--augment.flip 0.5 --optim.clip_norm 1",
        world_sizes=(2,),  # each process imports torchvision and checks 11 M parameters
    ),
    Case(
        *("colour-24x40-transformer", (24, 40, 3), 37, 150, 50, VIT, 64),
        flags="--augment.rotate 5 --augment.shift 3 --optim.name adamw --optim.lr 0.001",
        num_validation=74,
        suffix=".safetensors",
        world_sizes=(3, 4),
    ),
    Case(
        *("grey-40x24-tiny", (40, 24), 2, 100, 33, "tiny", 64, 2),
        flags="--augment.shear 5 --augment.erase 0.5 --eval.batch_size 7",
        num_validation=21,
    ),
    Case(
        *("colour-8x8-of-300-classes", (8, 8, 3), 300, 302, 300, f"{OWN}:small", 104),
        flags="--augment.flip 0.5 --augment.scale 0.1 --train.channels_last false",
        suffix=".safetensors",
    ),
    Case(
        *("grey-8x8-seven-examples", (8, 8), 2, 7, 2, f"{OWN}:small", 64, 4),
        flags="--augment.shift 8",
        world_sizes=(3, 8),
    ),
    Case(
        *("grey-8x8-100003-examples", (8, 8), 2, 100_003, 500, f"{OWN}:mlp", 33_336),
        suffix=".safetensors",
    ),
    Case(
        *("colour-64x64-cnn-of-300-classes", (64, 64, 3), 300, 301, 300, "cnn", 152),
        flags="--augment.rotate 10",
    ),
    Case(
        *("grey-64x64-tiny_bn-bf16", (64, 64), 37, 130, 41, "tiny_bn", 64),
        flags="--augment.scale 0.1 --optim.ema 0.5 --train.precision bf16",
    ),
]

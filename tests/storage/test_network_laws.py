"""Networks that are other ones in another process, copy or place are refused. Sources are read where they are."""

import dataclasses
import os
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from in_process import Run
from ranks.processes import Ranks, arguments, train

from train.config import Config, DataConfig, ModelConfig, TrainConfig
from train.errors import UserError
from train.state import Plan
from train.storage import network
from train.warmup import warm_up
from train.world.world import World

SHAPE, NUM_CLASSES = (3, 12, 12), 4
MODULE = """
import os
import random
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, num_classes):
        super().__init__()
        self.fc = nn.Linear(shape[0] * shape[1] * shape[2], num_classes)
        self.norm = nn.BatchNorm1d(num_classes)
        {init}

    def forward(self, images):
        {forward}
        return self.norm(self.fc(images.flatten(1)))
"""


def write(folder: Path, init: str = "", forward: str = "") -> Path:
    path = folder / "net.py"
    path.write_text(MODULE.format(init=init, forward=textwrap.indent(textwrap.dedent(forward), " " * 8).strip()))
    return path


def build(path: Path, *, is_averaged: bool = False, weights: Path | None = None) -> network.Network:
    config = ModelConfig(name=f"{path}:Net", weights=str(weights) if weights else None)
    return network.build(config, SHAPE, NUM_CLASSES, 0, channels_last=True, is_averaged=is_averaged)


STATE = "self.calls += self.training\nif self.calls > 100: images = images / 2"
LAMBDA = "self.head = lambda images: self.norm(self.fc(images.flatten(1)))"
BAD = {
    "a number that another generator draws": (
        "self.scale = np.random.default_rng().uniform()", "images = images * self.scale", "`seed` does not decide"
    ),
    "a plain tensor that the process draws": (
        "self.scale = torch.tensor(random.SystemRandom().random())", "images = images * self.scale", "does not decide"
    ),
    "a slow count in Python": ("self.calls = 0", STATE, "calls changed in a pass"),
    "a layer in evaluation mode": ("self.norm.eval()", "", "norm is in evaluation mode, which training ends"),
    "evaluation for ever": ("self.train = lambda mode=True: super(Net, self).train(False)", "", "leaves it in eval"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_network_that_is_another_one_elsewhere_is_refused(case: str, tmp_path: Path) -> None:
    init, forward, words = BAD[case]
    with pytest.raises(UserError, match=words):
        build(write(tmp_path, init, forward))


def test_network_whose_copy_computes_with_the_original_is_refused_where_weights_are_averaged(tmp_path: Path) -> None:
    path = write(tmp_path, LAMBDA, "return self.head(images)")
    build(path)
    with pytest.raises(UserError, match="computes with the weights of the original"):
        build(path, is_averaged=True)
    build(write(tmp_path), is_averaged=True)


def test_network_may_change_its_input(tmp_path: Path) -> None:
    build(write(tmp_path, forward="images.mul_(0.5)"))


def test_network_with_other_names_on_another_rank_is_refused_on_all(tmp_path: Path) -> None:
    path = write(tmp_path, "setattr(self, f\"extra_{os.environ.get('RANK')}\", nn.Linear(2, 2).requires_grad_(False))")
    flags = arguments(tmp_path / "run", f"--model.name {path}:Net --train.num_micro_batches 2 --train.max_steps 2")
    ranks = Ranks(2, flags, tmp_path / "logs")
    assert set(ranks.wait()) == {2}
    assert "give another network on rank 1" in ranks.output()


def test_sources_outside_of_the_folder_are_neither_kept_nor_written(tmp_path: Path) -> None:
    """A path with .. is inside of a folder by its text alone."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "precious.py").write_text("X = 1\n")
    text = (
        "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent / '..' / '..'))\nimport precious\n"
    )
    path = write(tmp_path / "a" / "b")
    path.write_text(text + path.read_text())
    assert set(build(path).sources) == {"net.py"}


def test_weights_that_are_no_finite_floats_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    own = build(path).module.state_dict()
    for name, bad in {"nan": torch.full((4,), float("nan")), "int": torch.ones(4, dtype=torch.int64)}.items():
        safetensors.torch.save_file({**own, "fc.bias": bad}, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=r"fc\.bias is torch\.\w+ or not finite"):
            build(path, weights=tmp_path / f"{name}.safetensors")


def test_dropout_of_everything_leaves_nothing(tmp_path: Path) -> None:
    found = build(write(tmp_path, "self.drop = nn.Dropout(1.0)", "images = images + self.drop(images)"))
    assert found.module.drop.p == 1


def test_data_rewritten_with_the_same_size_and_time_are_read_again(tmp_path: Path) -> None:
    """rsync -t and cp -p keep the time of a file's content, but not that of its change."""
    path, labels = tmp_path / "x.npz", np.arange(30) % 3
    images = np.random.default_rng(0).integers(0, 255, (30, 12, 12), dtype=np.uint8)
    hashes = set()
    for each in (images, 255 - images):
        np.savez(path, train_images=each, train_labels=labels, test_images=each, test_labels=labels)
        os.utime(path, ns=(1, 1))
        summary = train(1, tmp_path / "run", f"--data.name {path} --train.max_steps 1")
        hashes.add(summary["sha256"]["data"])
        shutil.rmtree(tmp_path / "run")
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("f_backward does not have a deterministic implementation, but", "Replace that layer, or pass --train.exact"),
        ("Expected all tensors to be on the same device, but found cpu", "Make tensors on images.device"),
    ],
)
def test_operation_that_the_device_refuses_is_one_line(
    message: str, advice: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU refuses some in exact mode. The first step finds out, since the checks before it run on the CPU."""

    def refuse(plan: Plan, state: object) -> None:
        plan.world.clock.enter("forward_backward")
        raise RuntimeError(message)

    run = Run.open(Config(data=DataConfig("digits"), model=ModelConfig("tiny"), train=TrainConfig(device="cpu")), world)
    monkeypatch.setattr("train.warmup.train_step", refuse)
    plan = dataclasses.replace(run.plan, sources={"net.py": b""})
    with pytest.raises(UserError, match=f"model.name tiny on cpu in fp32: {message}. {advice}"):
        warm_up(plan, run.state, print)

"""A model of the user's own network and images is exported and predicts wherever its source lies."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks.processes import train

from launch.__main__ import main
from launch.deploy import formats
from train.storage import arrays
from train.storage.arrays import Arrays

NETWORK = """
from torch import nn
from layers_of_mine import block

def build(shape, num_classes):
    features = 8 * shape[1] * shape[2]
    return nn.Sequential(block(shape[0]), nn.Flatten(), nn.Dropout(0.1), nn.Linear(features, num_classes))
"""
NEIGHBOUR = """
from torch import nn

def block(channels):
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
"""
NAMES = ["red", "green", "blue"]


def pictures(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images uint8 [size,12,20,3], each brightest in one channel, and that channel as their label."""
    generator, labels = torch.Generator().manual_seed(seed), torch.arange(size) % 3
    images = torch.randint(0, 120, (size, 12, 20, 3), dtype=torch.uint8, generator=generator)
    images[torch.arange(size), :, :, labels] += 120
    return images, labels


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, a network and a trained run."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "net.py").write_text(NETWORK)
    (folder / "layers_of_mine.py").write_text(NEIGHBOUR)
    parts = {"train": pictures(96, 0), "validation": pictures(12, 1), "test": pictures(30, 2)}
    tensors = {
        f"{part}_{kind}": value
        for part, pair in parts.items()
        for kind, value in zip(("images", "labels"), pair, strict=True)
    }
    arrays.write(folder / "colours.safetensors", Arrays(tensors, NAMES))
    flags = f"--data.name {folder}/colours.safetensors --model.name {folder}/net.py:build --train.num_micro_batches 2"
    summary = train(1, folder / "run", f"{flags} --train.epochs 4 --train.global_batch_size 32 --optim.lr 0.02")
    assert summary["results"]["raw"]["accuracy"] == 1
    return folder


@pytest.fixture
def moved(project: Path, tmp_path: Path) -> Path:
    """Return a copy of the run alone, whose config names a network that is no longer there."""
    run = Path(shutil.copytree(project / "run", tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"{project}/net.py", "/nowhere/net.py"))
    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Return a larger green picture."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[..., 1] = 200
    Image.fromarray(pixels).save(tmp_path / "green.png")
    return tmp_path / "green.png"


def answer(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main(["predict", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)[0]["label"]


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main([*map(str, argv)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_safetensors_of_an_own_network_names_its_source_and_needs_it(
    project: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    assert main(["export", str(project / "run"), "--output", str(path)]) == 0
    assert "100.00% of 12 validation images" in capsys.readouterr().out
    sha256 = json.loads((project / "run" / "summary.json").read_text())["sha256"]["network"]
    card = path.with_name("model.safetensors.md").read_text()
    assert all(words in card for words in ("float32 [N,3,12,20]", "red, green, blue", "net.py:build", sha256))
    model = f"{project}/net.py:build"
    assert formats.read(path, model).facts.network_sha256 == sha256
    assert answer(capsys, path, picture, "--model-file", model) == "green"
    assert "--model-file FILE.py:FUNCTION" in refusal(capsys, "predict", path, picture)
    (tmp_path / "net.py").write_text(NETWORK + "\n")
    (tmp_path / "layers_of_mine.py").write_text(NEIGHBOUR)
    found = refusal(capsys, "predict", path, picture, "--model-file", f"{tmp_path}/net.py:build")
    assert "has SHA-256" in found
    assert sha256[:12] in found


def test_onnx_of_an_own_network_needs_no_source(
    moved: Path, project: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    assert main(["export", str(project / "run"), "--output", str(path)]) == 0
    assert answer(capsys, path, picture) == "green"


def test_a_run_predicts_with_the_source_that_it_kept(
    moved: Path, project: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(capsys, project / "run", picture) == "green"
    assert "there is no file /nowhere/net.py" in refusal(capsys, "predict", moved, picture)
    kept = f"{moved}/network/net.py:build"
    assert answer(capsys, moved, picture, "--model-file", kept) == "green"
    output = moved / "model.safetensors"
    assert main(["export", str(moved), "--output", str(output), "--", "--model.name", kept]) == 0


def test_export_evaluates_the_split_that_is_asked_for(project: Path, tmp_path: Path) -> None:
    options = ["--output", str(tmp_path), "--", "--data.eval_split", "test"]
    assert main(["export", str(project / "run"), *options]) == 0
    assert "Accuracy on the test split: 100.00% (30 of 30)" in (tmp_path / "model.safetensors.md").read_text()

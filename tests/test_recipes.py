"""Every recipe in configs/ starts as its first line says, and trains the same on 1 to 8 ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from ranks.processes import rows, train

# sweep.yaml is for `wandb sweep`, not for --config
RECIPES = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem != "sweep"]


@pytest.mark.sample(4)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_starts_and_names_its_command(tmp_path: Path, recipe: Path) -> None:
    text = recipe.read_text()
    assert f"python -m train --config configs/{recipe.name}" in text
    assert (yaml.safe_load(text)["data"].get("fallback", False)) == (recipe.stem == "quickstart")
    short = "--train.max_steps 2 --train.num_threads 1 --data.name digits --eval.batch_size 100"
    short += " --log.progress false --log.report false"
    command = [sys.executable, "-m", "train", "--config", str(recipe), *short.split(), "--run.dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.iterdir()
    assert run.name.startswith(f"{recipe.stem}-2")
    assert str(run / "summary.json") in done.stdout


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_the_same_on_1_to_8_ranks(tmp_path: Path, recipe: Path) -> None:
    """Only the precision is not the recipe's: round-off is small in fp32. Exact recipes give the same bits."""
    flags = f"--config {recipe} --data.name digits --train.max_steps 3 --log.every_steps 1 --train.precision fp32"
    given = yaml.safe_load(recipe.read_text())
    size = f"--model.name {given['model']['name']} --train.global_batch_size {given['train']['global_batch_size']}"
    found = {}
    for world_size in (1, 2, 3, 4, 8) if recipe.stem in ("exact", "mnist") else (1, 8):
        run = tmp_path / f"on-{world_size}"
        found[world_size] = train(world_size, run, flags, size)
        assert found[world_size]["world_size"] == world_size
        losses = [row["loss"] for row in rows(run, "train")]
        assert losses == pytest.approx([row["loss"] for row in rows(tmp_path / "on-1", "train")], rel=1e-3)
    if given["train"].get("exact"):
        assert len({summary["weights_sha256"] for summary in found.values()}) == 1


@pytest.mark.slow
@pytest.mark.mnist
def test_quickstart_reaches_99_percent_on_mnist(tmp_path: Path, mnist_root: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "launch",
        "run",
        "--",
        "--config",
        "configs/quickstart.yaml",
        "--run.dir",
        str(tmp_path),
    ]
    env = os.environ | {"MNIST_ROOT": str(mnist_root)}
    done = subprocess.run([*command, "--run.name", "q"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "q" / "summary.json").read_text())
    assert summary["data"]["name"] == "mnist"
    assert summary["num_examples"] == 10_000
    assert summary["results"]["raw"]["accuracy"] >= 0.989  # one seed; the mean of five is in the recipe

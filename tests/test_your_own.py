"""docs/your-own.md: its commands work as they stand, from a folder of pictures to a prediction."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "your-own.md").read_text()


@pytest.mark.slow
def test_the_five_commands_of_the_page_lead_from_pictures_to_a_prediction(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = [line for line in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)[0].splitlines() if line]
    assert len(commands) == 5
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = []
    for command in [f"python {ROOT / 'docs' / 'textures.py'}", *commands]:
        argv = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        printed.append(done.stdout)
    assert re.search(r"all +519 +192 +57\n", printed[1])
    summary = json.loads((tmp_path / "runs" / "textures" / "summary.json").read_text())
    assert (summary["split"], summary["num_examples"], summary["exact"]) == ("validation", 57, True)
    assert (tmp_path / "runs" / "textures" / "report.html").is_file()
    share = re.search(r"([\d.]+)% of 192 test images", printed[4])
    assert share
    assert float(share[1]) > 95
    assert printed[5].startswith("textures/test/brick/000-384.png: brick")


@pytest.mark.sample(1)
@pytest.mark.parametrize("network", ["resnet18", "vit"])
def test_the_networks_of_the_page_train(network: str, tmp_path: Path) -> None:
    (line,) = re.findall(rf"python -m train (.*configs/networks/{network}\.py.*)", PAGE)
    flags = line.replace("configs/", f"{ROOT}/configs/").split()
    small = "--data.name random --data.random_examples 96 --train.max_steps 2 --log.report false --run.name r"
    argv = [sys.executable, "-m", "train", *flags, *small.split(), "--run.dir", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["sha256"].keys() == {"data", "network"}
    assert (tmp_path / "r" / "network" / f"{network}.py").read_bytes() == (
        ROOT / "configs" / "networks" / f"{network}.py"
    ).read_bytes()

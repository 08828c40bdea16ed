"""A person's installation: no metadata, another train.py around, a repository that git distrusts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from ranks.processes import arguments

SMALL = "--train.max_steps 5"


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("missing", [("lockstep",), ("lockstep", "wandb", "torchvision")])
def test_checkout_that_is_not_installed_trains_to_its_summary(missing: tuple[str, ...], tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(next(place for place in sys.path if place.endswith("site-packages"))).iterdir():
        if not path.name.startswith((*missing, "__editable__")):
            (packages / path.name).symlink_to(path)
    argv = arguments(tmp_path / "run", SMALL, "--data.name random --data.random_examples 200 --wandb.mode online")
    done = run([sys.executable, "-S", "-m", "train", *argv], ROOT, PYTHONPATH=str(packages))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    versions = json.loads((tmp_path / "run" / "summary.json").read_text())["versions"]
    assert "lockstep" in versions
    assert not versions.keys() & set(missing[1:])


@pytest.mark.parametrize("other", ["train.py", "train/__init__.py"])
def test_launcher_finds_its_own_package_next_to_another_train(other: str, tmp_path: Path) -> None:
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("raise SystemExit('the other program')")
    argv = [sys.executable, "-m", "launch", "run", "--", *arguments(tmp_path / "run", SMALL)]
    done = run(argv, tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "the other program" not in done.stderr


@pytest.mark.parametrize("variables", [{"PYTHONOPTIMIZE": "2"}, {"PYTHONSAFEPATH": "1"}, {}], ids=str)
def test_launcher_starts_ranks_that_find_what_the_user_imports(variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "mine.py").write_text("from train.functional.models import build\n")
    (tmp_path / "net.py").write_text(
        "import math\nimport mine\nfrom torch import nn\n\n\ndef net(shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), num_classes))\n"
    )
    argv = [sys.executable, "-m", "launch", "run", "--", *arguments(tmp_path / "run", SMALL, "--model.name net.py:net")]
    done = run(argv, tmp_path, PYTHONPATH=f"{tmp_path}/libs:{ROOT}", **variables)
    assert done.returncode == 0, done.stderr


def test_commit_is_recorded_in_a_repository_of_another_user(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "init", "-q", clone], check=True)
    for name in ("train", "launch"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(clone), "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    show = "from train.world.environment import git_commit; print(git_commit())"
    # git's own variable for tests: it takes every repository for one of another user
    done = run([sys.executable, "-c", show], clone, PYTHONPATH=str(clone), GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    assert len(done.stdout.strip().rstrip("+")) == 40

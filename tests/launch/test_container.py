"""slurm/Dockerfile names what exists. No test builds the image: that takes minutes and 6 GB."""

import json
import re
import shlex
import subprocess
import sys

from conftest import ROOT

LINES = (ROOT / "slurm" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
STEPS = [line.split(maxsplit=1) for line in LINES if line and not line.startswith("#")]
COPIED = {name for step, rest in STEPS if step == "COPY" for name in rest.split()[:-1]}
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_dockerfile_is_short() -> None:
    assert len((ROOT / "slurm" / "Dockerfile").read_text().splitlines()) <= 20


def test_all_that_is_copied_is_in_the_repository() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {name.partition("/")[0] for name in tracked} >= COPIED
    assert {"pyproject.toml", "README.md", "constraints.txt", "train", "launch", "configs"} == COPIED


def test_python_and_extras_are_those_of_the_project() -> None:
    (image,) = (rest for step, rest in STEPS if step == "FROM")
    python, lowest = re.fullmatch(r"python:3\.(\d+)-slim", image), re.search(r'requires-python = ">=3\.(\d+)"', PROJECT)
    assert python
    assert lowest
    assert int(python[1]) >= max(int(lowest[1]), 11)  # constraints.txt has nothing for older ones
    (install,) = (shlex.split(rest.split("&&")[0]) for step, rest in STEPS if step == "RUN")
    assert install[:2] == ["pip", "install"]
    assert install[install.index("--constraint") + 1] == "constraints.txt"
    extras = re.fullmatch(r"\.\[(.*)\]", install[install.index("--editable") + 1])
    assert extras
    assert all(re.search(rf"(?m)^{extra} = \[", PROJECT) for extra in extras[1].split(","))


def test_command_is_accepted() -> None:
    (command,) = (json.loads(rest) for step, rest in STEPS if step == "CMD")
    assert command[:5] == ["python", "-m", "launch", "run", "--"]
    argv = [sys.executable, "-m", "train", *command[5:], "--print_config"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {argument.partition("/")[0] for argument in command if "/" in argument} <= COPIED

"""What is accepted although it is unusual gets one line."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks.processes import arguments

LINES = {
    "--train.max_steps 2 --train.global_batch_size 2048": "train.global_batch_size 2048 exceeds the training split",
    "--train.max_steps 2 --train.num_threads 64": "training will be slow: 1 process(es) of 64 thread(s) share",
    "--train.max_steps 2 --train.epochs 9": "train.epochs has no effect, because train.max_steps is 2",
    "--train.max_steps 30 --optim.lr 50": "no better than always answering one class: the run diverged",
}


@pytest.mark.parametrize("flags", LINES)
def test_unusual_run_gets_one_line(
    flags: str, tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = python("-m", "train", *arguments(tmp_path / "run", flags))
    assert done.returncode == 0
    assert sum(LINES[flags] in line for line in done.stdout.splitlines()) == 1


def test_ordinary_run_gets_none_of_them(
    tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = python("-m", "train", *arguments(tmp_path / "run", "--train.max_steps 60"))
    assert not [line for line in done.stdout.splitlines() if "warning" in line and "other processes keep" not in line]

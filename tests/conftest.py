"""Give in-process tests a quiet environment, a cache of their own and a world of one process."""

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from train.config import TrainConfig
from train.world.world import World

if TYPE_CHECKING:
    from wandb_server import Server

    from train.storage.checkpoint import Snapshot

TORCH = tuple(int(part) for part in version("torch").split(".")[:2])
ROOT = Path(__file__).parent.parent
MNIST = ((1, 28, 28), 10)  # an image's shape, and the number of classes
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_ID",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "ACCELERATE_MIXED_PRECISION",
)
# The caller's MNIST directory and GPUs, for marked tests. All others must not depend on them.
MNIST_ROOT = os.environ.get("MNIST_ROOT")
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # otherwise torch keeps its first count of GPUs for this process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow the cases that a `sample` leaves out."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    for same in cases.values():
        if sample := same[0].get_closest_marker("sample"):
            distance = len(same) / sample.args[0]
            kept = {int(number * distance) for number in range(sample.args[0])}
            for number in set(range(len(same))) - kept:
                same[number].add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def quiet_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set up the session: W&B off, the data cache in a temporary directory, no GPU and no launcher's variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("MNIST_ROOT", raising=False)
        for name in LAUNCHER_VARIABLES:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def gpus_of_marked_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Show the caller's GPUs to a test that is marked gpu."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        if VISIBLE_GPUS is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE_GPUS)


@pytest.fixture
def world() -> Iterator[World]:
    """Open a world of one process on the CPU."""
    opened = World.open(TrainConfig(device="cpu"))
    yield opened
    opened.close()


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run this Python with arguments in the project's root; extra environment variables by keyword."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.fixture
def mnist_root() -> Path:
    """Return the caller's directory with the original MNIST files; skip the test without one."""
    if not MNIST_ROOT:
        pytest.skip("MNIST_ROOT is not set: the original MNIST files are needed")
    return Path(MNIST_ROOT)


@pytest.fixture
def server() -> Iterator["Server"]:
    """Start a local W&B server; fail if it recorded a fault."""
    from wandb_server import Server

    with Server() as running:
        yield running
    assert running.faults == []


@pytest.fixture
def env(tmp_path: Path, server: "Server") -> dict[str, str]:
    """Return the environment of a user with a key, a server and a home directory of their own."""
    from wandb_server import KEY

    (tmp_path / "home").mkdir()
    return {**server.env, "WANDB_API_KEY": KEY, "HOME": str(tmp_path / "home")}


def small_state(step: int = 10) -> "Snapshot":
    """Return a small state whose tensors depend on its step."""
    import torch

    from train.storage.checkpoint import SCHEMA, Snapshot

    return Snapshot(
        model={"fc.weight": torch.arange(6.0).view(2, 3) + step, "fc.bias": torch.zeros(2)},
        optimizer={"fc.weight/momentum_buffer": torch.ones(2, 3) * step, "fc.weight/step": torch.tensor(float(step))},
        ema={"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)},
        meta={"schema": SCHEMA, "step": step, "best": None, "lr": 0.1},
    )


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run on the digits: about 98 % right, averaged weights, its best step before its last."""
    from ranks.processes import train

    run = tmp_path_factory.mktemp("runs") / "digits"
    flags = (
        "--model.dropout 0.1 --augment.shift 1 --augment.rotate 5 --optim.lr 0.05 --optim.ema 0.95 --optim.clip_norm 5"
    )
    train(1, run, flags, "--train.epochs 20 --checkpoint.keep 9 --eval.every_steps 115")
    return run


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Start a training that must be refused within 30 s of CPU time; return the one line on stderr."""
    from train.__main__ import main

    began = time.process_time()
    assert main(argv) == 2
    assert time.process_time() - began < 30  # a busy machine imports torch in 10
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 600
    return lines[0]


@pytest.fixture(scope="session")
def exported(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export the run of `digits_run` to each format."""
    from launch.__main__ import main
    from launch.deploy import formats

    folder = tmp_path_factory.mktemp("exported")
    for kind in formats.SUFFIXES:
        assert main(["export", str(digits_run), "--format", kind, "--output", str(folder)]) == 0
    return {kind: folder / f"model{suffix}" for kind, suffix in formats.SUFFIXES.items()}

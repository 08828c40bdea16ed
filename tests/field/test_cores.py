"""Threads are as many as the cores that a process was given; a busy machine is named, and does not break down."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ranks.processes import arguments

from train.config import TrainConfig
from train.world import cores
from train.world.launcher import Placement

ALONE = Placement(0, 1, 0, 1)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pretend to have eight cores and no control groups."""
    monkeypatch.setattr(cores, "own_cores", lambda: list(range(8)))
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "none")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


LAYOUTS = {
    "v2": ("0::/pod/main", {"pod/main/cpu.max": "150000 100000"}, 2),
    "v2, of a parent": ("0::/pod/main", {"pod/main/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3),
    "v2, in a container": ("0::/", {"cpu.max": "50000 100000"}, 1),
    "v2, unlimited": ("0::/", {"cpu.max": "max 100000"}, 8),
    "v2, more than there are": ("0::/", {"cpu.max": "6400000 100000"}, 8),
    "v1": ("4:cpu,cpuacct:/q", {"cpu/q/cpu.cfs_quota_us": "200000", "cpu/q/cpu.cfs_period_us": "100000"}, 2),
    "v1, of the host": ("4:cpu:/docker/7", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    "v1, unlimited": ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    "others": ("5:cpuset:/\n1:name=systemd:/", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_quota_limits_the_threads(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, files, expected = LAYOUTS[layout]
    for name, content in files.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(f"{content}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "sys")
    assert cores.choose_num_threads(TrainConfig(), ALONE) == expected
    assert cores.choose_num_threads(TrainConfig(num_threads=5), ALONE) == 5


@pytest.mark.parametrize(
    ("value", "num_ranks", "expected"),
    [
        ("3", 1, 3),
        ("1", 1, 1),
        ("3,2", 1, 3),
        ("64", 1, 8),
        ("", 1, 8),
        ("x", 1, 8),
        ("0", 1, 8),
        ("1", 2, 4),
        ("2", 2, 2),
    ],
)
def test_omp_num_threads_is_an_upper_limit_but_for_the_1_of_launchers(
    value: str, num_ranks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cores.choose_num_threads(TrainConfig(), Placement(0, num_ranks, 0, num_ranks)) == expected


@pytest.fixture
def busy_core() -> Iterator[None]:
    """Keep the first core of this process busy."""
    core = sorted(os.sched_getaffinity(0))[0]
    spin = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    process = subprocess.Popen((sys.executable, "-c", spin))
    yield
    process.kill()
    process.wait()


def test_busy_cores_are_named(busy_core: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "own_cores", lambda: sorted(os.sched_getaffinity(0))[:1])
    assert cores.why_slow(1, 1).startswith("other processes keep ")


def test_container_that_hides_its_load_trains_without_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/proc/stat")

    monkeypatch.setattr(psutil, "cpu_percent", refuse)
    assert cores.why_slow(1, 1) == ""


def test_more_threads_than_cores_are_named(
    tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = python("-m", "train", *arguments(tmp_path / "run", "--train.max_steps 3 --train.num_threads 99"))
    assert "warning: training will be slow: 1 process(es) of 99 thread(s) share " in done.stdout


def test_waiting_threads_spin_for_a_short_time(
    python: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # a training in this process has set it
    show = "from train.world.cores import limit_spinning as f; f(); import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert python("-c", show).stdout == "2000\n"
    assert python("-c", show, GOMP_SPINCOUNT="100").stdout == "100\n"
    assert python("-c", show, OMP_WAIT_POLICY="ACTIVE").stdout == "None\n"

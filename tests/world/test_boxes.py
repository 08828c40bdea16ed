"""The launcher's commands work with none, one, two and eight GPUs (mocked), and no GPU disturbs the tests."""

import json
import os
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks.processes import Ranks

import launch.run
from launch.bench import measures, peers
from launch.check import allreduce, checks, selftest
from launch.check.selftest import SAVE_STEPS, STEPS_PER_EPOCH
from train.cli import parse
from train.errors import RunError
from train.rundir import Evaluation, RunDir

BOXES = [0, 1, 2, 8]


def test_no_gpu_is_visible_to_a_test() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.device_count() == 0
    assert not torch.cuda.is_available()


@pytest.mark.gpu
def test_the_gpus_are_visible_to_a_test_that_is_marked(request: pytest.FixtureRequest) -> None:
    from conftest import VISIBLE_GPUS

    assert os.environ.get("CUDA_VISIBLE_DEVICES") == VISIBLE_GPUS


@pytest.mark.parametrize("gpus", ["", "2,3", None])
def test_ranks_see_the_gpus_that_the_test_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str | None
) -> None:
    """The fork server has the environment of the first test that needs it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if gpus is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    ranks = Ranks(2, ["CUDA_VISIBLE_DEVICES"], tmp_path / "logs", "ranks.environment")
    assert ranks.wait() == [0, 0]
    assert [json.loads(line) for line in ranks.output().splitlines()] == [{"CUDA_VISIBLE_DEVICES": gpus}] * 2


@pytest.mark.parametrize(
    ("nodes", "asked"),
    [([], False), (["nvidiactl", "nvidia-uvm", "nvidia-caps"], False), (["nvidia2", "nvidia3"], True), (["kfd"], True)],
)
def test_gpus_are_counted_whatever_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[str], asked: bool
) -> None:
    """A container gets the device nodes of its own GPUs alone."""
    for node in nodes:
        (tmp_path / node).touch()
    monkeypatch.setattr(launch.run, "DEV", tmp_path)
    monkeypatch.setattr(
        subprocess, "run", lambda *arguments, **options: subprocess.CompletedProcess(arguments, 0, "2\n")
    )
    assert launch.run.count_gpus() == (2 if asked else 0)
    assert [finding.status for finding in checks.gpus(parse([]))] == ["OK"]  # they are hidden on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (finding,) = checks.gpus(parse([]))
    assert finding.status == ("fail" if "nvidia2" in nodes else "OK")


class Started:
    """A replacement for subprocess.Popen that records what would have been started."""

    def __init__(self, command: Any, env: dict[str, str], **options: Any) -> None:
        self.env = env
        self.returncode = 1
        every_process.append(self)

    def poll(self) -> int:
        return 1

    def kill(self) -> None:
        pass

    def wait(self) -> int:
        return 1


every_process: list[Started] = []


@pytest.mark.parametrize("start", ["launch run", "launch doctor"])
def test_ranks_of_one_machine_stay_on_the_loopback_interface(monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    monkeypatch.setattr(subprocess, "Popen", Started)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    every_process.clear()
    if start == "launch run":
        launch.run.Ranks(2, [])
    else:
        with pytest.raises(RunError):
            allreduce.run_local(("program",), 2, [], 1)
    assert len(every_process) == 2
    for rank, process in enumerate(every_process):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        interface = {"GLOO_SOCKET_IFNAME": launch.run.LOOPBACK, "NCCL_SOCKET_IFNAME": launch.run.LOOPBACK}
        assert process.env.items() >= {**place, **interface, "MASTER_ADDR": "127.0.0.1"}.items()


def test_a_site_may_name_another_interface_but_no_other_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    every_process.clear()
    launch.run.Ranks(1, [])
    (process,) = every_process
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert process.env.items() >= {**place, "NCCL_SOCKET_IFNAME": "ib0"}.items()
    assert "LOCKSTEP_STORE_FD" not in process.env


@pytest.mark.parametrize("gpus", BOXES)
def test_demo_trains_on_gpus_only_where_all_its_processes_have_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpus: int
) -> None:
    monkeypatch.setattr(selftest, "count_gpus", lambda: gpus)
    asked: list[tuple[int, str]] = []

    def train(run: RunDir, world_size: int, flags: list[str], kill_after: int) -> None:
        config = parse(flags)
        asked.append((world_size, config.train.device))
        assert (kill_after > 0) == (world_size == 2)

    monkeypatch.setattr(selftest, "train", train)
    result = Evaluation(0.9, 0.1, 324, "", [])
    summary = SimpleNamespace(weights_sha256="0" * 64, data={"name": "digits"}, final=result)
    monkeypatch.setattr(RunDir, "read_summary", lambda self: summary)
    assert selftest.demo([]) == 0
    device = "cuda" if gpus == 8 else "cpu"
    assert asked == [(world_size, device) for world_size in (1, 2, 3, 4)]
    capsys.readouterr()


@pytest.mark.parametrize(("gpus", "exact", "scaling"), [(1, [1], [1]), (2, [1, 2], [1, 2]), (8, [1, 2], [1, 2, 4, 8])])
def test_bench_starts_no_more_processes_than_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, exact: list[int], scaling: list[int]
) -> None:
    monkeypatch.setattr(measures, "count_gpus", lambda: gpus)
    sizes: set[int] = set()
    monkeypatch.setattr(measures, "images_per_second", lambda size, batch, flags: sizes.add(size) or 1.0)
    for measure, expected in ((measures.exact, exact), (measures.scaling, scaling)):
        sizes.clear()
        rows = measure(1)
        assert sorted(sizes) == expected
        assert {row.base for row in rows} <= {row.name for row in rows} | {None}


def test_bench_measures_exact_mode_on_two_cpu_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "count_gpus", lambda: 0)
    monkeypatch.setattr(measures, "images_per_second", lambda *arguments: 1.0)
    assert {row.name.split(",")[0] for row in measures.exact(1)} == {"1 process", "2 processes"}


@pytest.mark.parametrize(
    ("cores", "counts"), [(1, [0, 1]), (2, [0, 1, 2]), (6, [0, 1, 2, 4]), (16, [0, 1, 2, 4, 8, 16])]
)
def test_peers_may_use_all_cores_for_their_loaders(
    monkeypatch: pytest.MonkeyPatch, cores: int, counts: list[int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert peers.worker_counts() == counts


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_selftest_finds_a_moment_to_kill_a_fast_training(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """A step on a GPU takes 3 ms, so the test may see only every fifth to fifteenth. On a CPU it sees each."""
    generator = random.Random(0)

    class Fast:
        def __init__(self) -> None:
            self.step, self.last, self.is_killed = 0, selftest.EPOCHS[device] * STEPS_PER_EPOCH, False
            self.processes = [self]

        def poll(self) -> int | None:
            return 0 if self.step == self.last else None

        def kill(self) -> None:
            self.is_killed = True

        def advance(self, seconds: float) -> None:
            self.step = min(self.last, self.step + (generator.randint(5, 15) if device == "cuda" else 1))

    for _ in range(200):
        training: Any = Fast()
        monkeypatch.setattr(selftest.time, "sleep", training.advance)
        rows = lambda self, training=training: [{"event": "train", "step": training.step}]  # noqa: E731
        monkeypatch.setattr(selftest.Tail, "rows", rows)
        assert selftest.kill_between_saves(training, RunDir(Path("run")), training.last // 2)
        assert training.is_killed
        assert training.step >= training.last // 2
        assert 1 <= training.step % SAVE_STEPS <= 3


@pytest.mark.parametrize(("visible", "cpu", "expected"), [(2, False, "nccl"), (2, True, "gloo"), (1, False, None)])
def test_all_reduce_chooses_its_device_as_the_training_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], visible: int, cpu: bool, expected: str | None
) -> None:
    def join(backend: str, **options: Any) -> None:
        raise ConnectionError(backend)

    set_to: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    monkeypatch.setattr(dist, "init_process_group", join)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    arguments = ["--cpu"] if cpu else []
    if expected is None:
        assert allreduce.main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: 2 processes on this machine, but 1 GPU(s).")
    else:
        assert allreduce.main(arguments) == 1
        assert capsys.readouterr().err == f"error: ConnectionError: {expected}\n"
        assert set_to == ([torch.device("cuda", 1)] if expected == "nccl" else [])

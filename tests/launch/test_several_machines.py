"""torchrun on two machines without Slurm. Each has its own network, host name and processes (slurm.lab)."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from ranks.processes import rows, train, wait_for_step
from slurm.cluster import TRAIN
from slurm.lab import Lab, why_not

STEPS = 200
FLAGS = [*TRAIN, "--train.max_steps", str(STEPS), "--log.report", "false", "--run.name", "m"]
pytestmark = [pytest.mark.skipif(why_not() is not None, reason=str(why_not())), pytest.mark.xdist_group("slurm")]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path / "lab", nodes=2)
    try:
        lab.boot_head()
        for node in lab.nodes:
            lab.boot(node)
        yield lab
    finally:
        lab.down()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the weights' SHA-256 of the run on one process."""
    return train(1, tmp_path_factory.mktemp("alone") / "m", *FLAGS[:-2])["weights_sha256"]


class Torchrun:
    """The agents of one run, which trains `seconds_per_step` more slowly than it could."""

    def __init__(self, lab: Lab, place: Path, nnodes: str, seconds_per_step: float = 0.0) -> None:
        self.lab, self.place, self.run = lab, place, place / "runs" / "m"
        settings = {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.env = os.environ | settings | {"SECONDS_PER_STEP": str(seconds_per_step)}
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29500", "--rdzv-conf", "last_call_timeout=5"]
        options = ["--nnodes", nnodes, "--nproc-per-node", "1", "--max-restarts", "3", *rendezvous]
        program = str(ROOT / "tests" / "slurm" / "rank.py")
        self.command = [sys.executable, "-m", "torch.distributed.run", *options, program, *FLAGS]

    def start(self, node: str) -> subprocess.Popen:
        with open(self.place / f"{node}.log", "a") as log:
            command = [*self.lab.enter(node, self.place), *self.command]
            return subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

    def starts(self) -> list[tuple[int, int]]:
        return [(row["world_size"], row["step"]) for row in rows(self.run, "start")]

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, f"{self.starts()}\n{self.output()}"
            time.sleep(0.05)

    def wait_for_world_size(self, world_size: int) -> None:
        self.wait(lambda: bool(self.starts()) and self.starts()[-1][0] == world_size)

    def output(self) -> str:
        return "".join(path.read_text() for path in self.place.glob("node*.log"))

    def finish(self, agents: list[subprocess.Popen]) -> str:
        """Return the weights' SHA-256 of a run that all agents end well."""
        assert [agent.wait(200) for agent in agents] == [0] * len(agents), self.output()
        assert [row["step"] for row in rows(self.run, "train")] == list(range(1, STEPS + 1))
        return rows(self.run, "saved")[-1]["weights_sha256"]


def test_two_machines_give_the_bits_of_one(machines: Lab, tmp_path: Path, undisturbed: str) -> None:
    torchrun = Torchrun(machines, tmp_path, "2")
    assert torchrun.finish([torchrun.start("node1"), torchrun.start("node2")]) == undisturbed
    assert torchrun.starts() == [(2, 0)]


@pytest.mark.slow
def test_machine_leaves_and_comes_back(machines: Lab, tmp_path: Path, undisturbed: str) -> None:
    """Steps since the last save are computed twice when it is lost, and none when it comes back."""
    torchrun = Torchrun(machines, tmp_path, "1:2", seconds_per_step=0.2)
    first, lost = torchrun.start("node1"), torchrun.start("node2")
    torchrun.wait_for_world_size(2)
    wait_for_step(torchrun.run, 45)
    machines.kill("node2")
    lost.wait(20)
    torchrun.wait_for_world_size(1)
    assert torchrun.starts()[-1][1] >= 40
    machines.boot("node2")
    back = torchrun.start("node2")
    torchrun.wait_for_world_size(2)
    assert torchrun.finish([first, back]) == undisturbed
    assert [world_size for world_size, _ in torchrun.starts()][-3:] == [2, 1, 2]
    assert torchrun.starts()[-1][1] == rows(torchrun.run, "preempted")[-1]["step"]


@pytest.mark.slow
def test_machine_of_the_rendezvous_leaves(machines: Lab, tmp_path: Path, undisturbed: str) -> None:
    """The other one ends, too, and the same commands resume the run."""
    torchrun = Torchrun(machines, tmp_path, "2", seconds_per_step=0.05)
    lost, other = torchrun.start("node1"), torchrun.start("node2")
    torchrun.wait_for_world_size(2)
    wait_for_step(torchrun.run, 45)
    machines.kill("node1")
    lost.wait(20)
    assert other.wait(120) == 1
    assert machines.run_on("node2", "pgrep", "-f", "rank.py", check=False) == ""
    machines.boot("node1")
    assert torchrun.finish([torchrun.start("node1"), torchrun.start("node2")]) == undisturbed
    assert torchrun.starts()[-1][1] >= 40

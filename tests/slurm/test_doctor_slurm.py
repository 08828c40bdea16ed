"""`launch doctor --slurm` passes on a good real Slurm, and finds each thing that is broken on one of its nodes."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from slurm.cluster import NEEDS_LAB
from slurm.lab import Lab
from slurm.lab import lab as start

pytestmark = NEEDS_LAB
ONLY_SLURM = """
import json, os, sys
from launch.check import cluster, doctor
from train.config import Config, RunConfig
cluster.QUEUE_SECONDS = int(os.environ.get("QUEUE_SECONDS", cluster.QUEUE_SECONDS))
cluster.JOIN_SECONDS = int(os.environ.get("JOIN_SECONDS", cluster.JOIN_SECONDS))
config = Config(run=RunConfig(dir=sys.argv[1]))
check = lambda config: cluster.slurm(config, int(sys.argv[2]), sys.argv[3:])
for finding in doctor.examine([("slurm", check)], config):
    print(json.dumps([finding.name, finding.status, finding.text, finding.remedy]))
"""


class Cluster:
    """Two nodes and a head; a call runs a command on one of them."""

    def __init__(self, running: Lab) -> None:
        self.lab, self.place = running, running.place.parent
        self.env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "WANDB_MODE": "disabled",
            "SLURM_CONF": f"{running.place}/slurm.conf",
        }

    def __call__(self, where: str, *command: str) -> subprocess.CompletedProcess[str]:
        enter = self.lab.enter(where, ROOT)
        return subprocess.run((*enter, *command), env=self.env, capture_output=True, text=True, timeout=200)

    def doctor(self, nodes: int = 2, *where: str) -> dict[str, tuple[str, str, str]]:
        """Run the Slurm checks on the head; return name -> (status, text, remedy)."""
        done = self("head", sys.executable, "-c", ONLY_SLURM, str(self.place / "runs"), str(nodes), *where)
        assert done.returncode == 0, done.stderr
        found = {
            name: (status, text, remedy) for name, status, text, remedy in map(json.loads, done.stdout.split("\n")[:-1])
        }
        assert all(remedy for status, _, remedy in found.values() if status != "OK")
        assert self("head", "squeue", "-h", "-n", "doctor", "-t", "PENDING,RUNNING").stdout == "", "a probe is left"
        assert list((self.place / "runs").glob(".doctor-*")) == []
        return found


@pytest.fixture(scope="module")
def lab() -> Iterator[Cluster]:
    place = Path(
        tempfile.mkdtemp(prefix="doctor-", dir="/tmp")
    )  # munge's user must get through, as it cannot in pytest's
    (place / "runs").mkdir()
    with start(place / "lab", nodes=2) as running:
        yield Cluster(running)
    shutil.rmtree(place, ignore_errors=True)


def test_a_good_cluster_is_ok(lab: Cluster) -> None:
    runs = str(lab.place / "runs")
    command = (sys.executable, "-m", "launch", "doctor", "--slurm")
    done = lab("head", "env", "-C", str(ROOT), *command, "--", "--data.name", "digits", "--run.dir", runs)
    lines = done.stdout.splitlines()[:-1]
    found = {line[5:19].strip(): (line[:5].strip(), line[19:]) for line in lines}
    names = {
        "sbatch",
        "partitions",
        "submit",
        "shared files",
        "network",
        "nodes",
        "packages",
        "all-reduce",
        "preemption",
    }
    assert names <= found.keys(), done.stderr
    assert {name: found[name] for name in names if found[name][0] != "OK"} == {}
    assert found["partitions"][1] == "main* 2 idle, urgent 2 idle"
    assert found["network"][1].startswith("2 node(s) add up right")
    assert "2 node(s) with the same versions: python 3." in found["nodes"][1]
    assert f"{runs} is shared by 2 node(s)" == found["shared files"][1]
    assert re.match(r"USR2 through Slurm: saved at step \d+, resumed to the same bits, \d+ s", found["preemption"][1])
    assert done.returncode == ("fail" in [status for status, _ in found.values()])


@pytest.mark.slow
def test_a_directory_that_one_node_does_not_share_fails(lab: Cluster) -> None:
    runs = str(lab.place / "runs")
    assert lab("node2", "mount", "-t", "tmpfs", "tmpfs", runs).returncode == 0
    try:
        status, text, remedy = lab.doctor()["shared files"]
    finally:
        lab("node2", "umount", runs)
    assert status == "fail"
    assert "node2 (No such file or directory)" in text
    assert "node1" not in text
    assert "run.dir" in remedy


@contextlib.contextmanager
def replaced(lab: Cluster, node: str, target: Path, content: str) -> Iterator[None]:
    """Show one node another content of a file."""
    copy = lab.place / f"{node}-{target.name}"
    copy.write_text(content)
    assert lab(node, "mount", "--bind", str(copy), str(target)).returncode == 0
    try:
        yield
    finally:
        lab(node, "umount", str(target))


ALLREDUCE = ROOT / "launch" / "check" / "allreduce.py"


@pytest.mark.slow
def test_other_versions_on_one_node_fail(lab: Cluster) -> None:
    older = ALLREDUCE.read_text().replace("platform.python_version()", "'3.9.1'")
    with replaced(lab, "node2", ALLREDUCE, older):
        status, text, remedy = lab.doctor()["nodes"]
    assert status == "fail"
    assert "node2: python 3.9.1" in text
    assert "same environment" in remedy


@pytest.mark.slow
def test_a_node_that_adds_wrong_fails(lab: Cluster) -> None:
    wrong = ALLREDUCE.read_text().replace("dist.all_reduce(values)", "dist.all_reduce(values); values += 1")
    with replaced(lab, "node2", ALLREDUCE, wrong):
        assert lab.doctor()["network"][:2] == ("fail", "1 wrong sums")


@pytest.mark.slow
def test_a_blocked_way_between_nodes_fails(lab: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lab.env, "JOIN_SECONDS", "10")
    assert lab("node2", "ip", "route", "add", "unreachable", "10.78.0.11").returncode == 0
    try:
        status, text, remedy = lab.doctor()["network"]
    finally:
        lab("node2", "ip", "route", "del", "unreachable", "10.78.0.11")
    assert status == "fail"
    assert re.search(r"node[12]: error: rank [01] could not join 2 ranks at node1, port \d+: ", text), text
    assert "GLOO_SOCKET_IFNAME" in remedy


@pytest.mark.slow
def test_names_that_mean_the_loopback_fail(lab: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian writes a node's own name to /etc/hosts as 127.0.1.1: the other nodes get that address."""
    monkeypatch.setitem(lab.env, "JOIN_SECONDS", "10")
    hosts = "10.78.0.11 node1\n10.78.0.12 node2\n10.78.0.1 head\n"
    with contextlib.ExitStack() as stack:
        for number, node in (("11", "node1"), ("12", "node2")):
            own = hosts.replace(f"10.78.0.{number}", "127.0.1.1")
            stack.enter_context(replaced(lab, node, Path("/etc/hosts"), own))
        status, text, remedy = lab.doctor()["network"]
    assert status == "fail", text
    assert "node" in text
    assert "/etc/hosts" in remedy


@pytest.mark.slow
def test_an_interface_that_is_not_there_fails(lab: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lab.env, "GLOO_SOCKET_IFNAME", "ib0")
    status, text, remedy = lab.doctor()["network"]
    assert status == "fail"
    assert "ib0" in text
    assert "GLOO_SOCKET_IFNAME" in remedy


@pytest.mark.slow
def test_a_node_without_the_program_fails(lab: Cluster) -> None:
    with replaced(lab, "node2", ALLREDUCE, "raise SystemExit('nothing here')\n"):
        status, text, _ = lab.doctor()["nodes"]
    assert status == "fail"
    assert text.startswith(("0 of 2", "1 of 2"))


@pytest.mark.slow
def test_a_cluster_that_loses_the_signal_fails(lab: Cluster) -> None:
    """USR2 stays ignored on both nodes, as by a wrapper that does not pass it on."""
    signals = ROOT / "train" / "world" / "signals.py"
    deaf = signals.read_text().replace("signal.SIGINT, signal.SIGUSR2)", "signal.SIGINT)")
    with replaced(lab, "node1", signals, deaf), replaced(lab, "node2", signals, deaf):
        status, text, remedy = lab.doctor()["preemption"]
    assert status == "fail"
    assert "ended with exit code 0, expected 75 and a checkpoint" in text
    assert "wrapper" in remedy


@pytest.mark.slow
def test_a_busy_cluster_is_a_warning(lab: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lab.env, "QUEUE_SECONDS", "5")
    batch = lab("head", "sbatch", "--parsable", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 300")
    job = batch.stdout.strip()
    assert job.isdigit(), batch.stderr
    lab("head", "bash", "-c", f"for _ in $(seq 300); do squeue -h -j {job} -t R | grep -q . && break; sleep 0.2; done")
    try:
        status, text, remedy = lab.doctor()["nodes"]
    finally:
        lab("head", "scancel", job)
    assert status == "warn"
    assert text.startswith("0 of 2 node(s) ran a probe")
    assert "busy" in remedy


@pytest.mark.slow
def test_jobs_that_cannot_be_are_refused(lab: Cluster) -> None:
    status, text, _ = lab.doctor(3)["submit"]
    assert status == "fail"
    assert "3 node(s) is refused" in text
    status, text, _ = lab.doctor(1, "--partition=nowhere")["submit"]
    assert status == "fail"
    assert "partition" in text


@pytest.mark.slow
def test_a_lost_node_is_a_warning(lab: Cluster) -> None:
    assert lab("head", "scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test").returncode == 0
    try:
        found = lab.doctor(1)
    finally:
        lab("head", "scontrol", "update", "NodeName=node2", "State=RESUME")
    assert found["partitions"][0] == "warn"
    assert "main* 1 drained" in found["partitions"][1]
    assert found["network"][0] == "OK"


def test_without_slurm_it_fails_at_once(lab: Cluster) -> None:
    """This tries a controller that has ended, and no Slurm at all."""
    command = (sys.executable, "-c", ONLY_SLURM, str(lab.place / "runs"), "2")
    ended, absent = {"SLURM_CONF": "/nonexistent/slurm.conf"}, {"PATH": "/nonexistent"}
    for change, words in ((ended, "the controller does not answer"), (absent, "No such file")):
        done = subprocess.run(command, env=lab.env | change, capture_output=True, text=True, timeout=200)
        name, status, text, remedy = json.loads(done.stdout)
        assert (name, status, words in text, "login node" in remedy) == ("sbatch", "fail", True, True), text

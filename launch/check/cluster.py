"""What `launch doctor --slurm` looks at: sbatch, partitions, and a probe that runs on real nodes for some seconds.

The probe (node.py) runs once per node under `srun`, whose standard input and output carry questions and answers: the shared
file system, the way between the nodes, and the clocks, by question and answer as NTP does. Invariant: it waits a bounded
time, and leaves no job and no file behind.
"""

import json
import math
import queue
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.check.checks import Finding
from train.config import Config

COMMAND_SECONDS, QUEUE_SECONDS, ANSWER_SECONDS = 15, 30, 45
PINGS = 5
SKEW_WARN_SECONDS, SKEW_FAIL_SECONDS = (
    1.0,
    60.0,
)  # leases and logs compare clocks; munge refuses credentials beyond 300 s
NODE = Path(__file__).with_name("node.py")


def ask(*command: str) -> tuple[bool, str]:
    """Run a Slurm command -> (whether it succeeded, what it printed)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


def slurm(config: Config, nodes: int, where: list[str]) -> Iterator[Finding]:
    """Check from sbatch to the nodes; stop where the next check would make no sense."""
    if not shutil.which("sbatch"):
        yield Finding("sbatch", "fail", "not on the PATH", "run this on a login node; module load slurm")
        return
    works, text = ask("scontrol", "ping")
    if not works or "is UP" not in text:
        yield Finding(
            "sbatch", "fail", f"the controller does not answer: {text[:150]}", "is slurmctld up? SLURM_CONF right?"
        )
        return
    yield Finding("sbatch", "OK", f"{ask('sbatch', '--version')[1]}; {text[:80]}")
    yield partitions()
    works, text = ask("sbatch", "--test-only", f"--nodes={nodes}", "--ntasks-per-node=1", *where, "--wrap=true")
    if not works:
        remedy = "other --nodes, --partition or --account: sinfo; sacctmgr show assoc user=$USER"
        yield Finding("submit", "fail", f"a job of {nodes} node(s) is refused: {text[:150]}", remedy)
        return
    yield Finding("submit", "OK", f"a job of {nodes} node(s) would be accepted")
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=config.run.dir) as place:
        yield from probe(Path(place).absolute() / "token", nodes, where)


def partitions() -> Finding:
    """Whether a partition is up, and which nodes are not."""
    _, text = ask("sinfo", "-h", "-o", "%P|%a|%D|%T")
    rows = [word.split("|") for word in text.split() if word.count("|") == 3]
    up = sorted({row[0] for row in rows if row[1] == "up"})
    if not up:
        return Finding("partitions", "fail", f"none is up: {text[:100]}", "ask who runs the cluster")
    lost = [
        f"{row[2]} {row[3]} in {row[0]}"
        for row in rows
        if row[3].rstrip("*~#!%$@^-").startswith(("down", "drain", "fail"))
    ]
    usable = {
        name: sum(int(row[2]) for row in rows if row[0] == name and row[3] in ("idle", "mixed", "allocated"))
        for name in up
    }
    text = f"nodes in use or idle: {', '.join(f'{name} {count}' for name, count in usable.items())}"
    if lost:
        return Finding("partitions", "warn", f"{text}; {', '.join(lost)}", "sinfo -R says why")
    return Finding("partitions", "OK", text)


class Probe:
    """The tasks of one `srun`, spoken to by lines of JSON."""

    def __init__(self, token: Path, content: str, nodes: int, where: list[str]) -> None:
        self.nodes = nodes
        limits = (
            f"--nodes={nodes}",
            "--ntasks-per-node=1",
            "--time=2",
            f"--immediate={QUEUE_SECONDS}",
            "--kill-on-bad-exit",
        )
        command = ("srun", "--job-name=doctor", *limits, *where, sys.executable, "-u", str(NODE), str(token), content)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1)
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def tell(self, order: dict[str, Any]) -> None:
        """Send a line to every node."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answers(self, seconds: float) -> dict[int, tuple[float, dict[str, Any]]]:
        """Return rank -> (when it arrived, its line), of as many nodes as answer in time."""
        found: dict[int, tuple[float, dict[str, Any]]] = {}
        deadline = time.monotonic() + seconds
        while len(found) < self.nodes:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if line is None:
                break
            if line.startswith('{"rank"'):  # no banner of the site
                answer = json.loads(line)
                found[answer["rank"]] = time.time(), answer
        return dict(sorted(found.items()))

    def close(self) -> str:
        """End the tasks, by their input's end or by a signal; return what srun said last."""
        assert self.process.stdin
        assert self.process.stderr
        try:
            self.process.stdin.close()
            self.process.wait(ANSWER_SECONDS / 3)
        except (OSError, subprocess.TimeoutExpired):
            self.process.terminate()  # srun cancels its step and allocation
            try:
                self.process.wait(ANSWER_SECONDS / 3)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return (self.process.stderr.read().strip().splitlines() or ["it said nothing"])[-1]


def probe(token: Path, nodes: int, where: list[str]) -> Iterator[Finding]:
    """Start a task per node and judge the file system, the network and the clocks."""
    content = secrets.token_hex(8)
    token.write_text(content)
    tasks = Probe(token, content, nodes, where)
    greetings: dict[int, dict[str, Any]] = {}
    try:
        greetings = {rank: answer for rank, (_, answer) in tasks.answers(QUEUE_SECONDS + ANSWER_SECONDS).items()}
        if len(greetings) == nodes:
            written = {rank: token.with_name(f"token.{rank}").exists() for rank in greetings}
            yield file_system(token.parent.parent, greetings, written)
            tasks.tell({"connect": [greetings[0]["host"], greetings[0]["port"]]})
            ways = {rank: answer for rank, (_, answer) in tasks.answers(ANSWER_SECONDS).items()}
            yield network(greetings, ways)
            yield clocks(tasks, greetings)
            return
    finally:
        last = tasks.close()
        if len(greetings) < nodes:
            busy = "mmediate" in last or "Unable to allocate" in last
            text = f"{len(greetings)} of {nodes} node(s) ran a probe: {last[:150]}"
            remedy = (
                "the cluster is busy: try again, or fewer --nodes" if busy else f"is {sys.executable} on every node?"
            )
            yield Finding("nodes", "warn" if busy else "fail", text, remedy)


def file_system(directory: Path, greetings: dict[int, dict[str, Any]], written: dict[int, bool]) -> Finding:
    """Judge whether every node sees this machine's run directory, and this machine what nodes write."""
    blind = [f"{answer['host']} ({answer['token']})" for answer in greetings.values() if answer["token"]]
    if not blind:
        blind = [
            f"what {greetings[rank]['host']} writes is not seen here" for rank, seen in written.items() if not seen
        ]
    if blind:
        text = f"{directory} is not shared: {', '.join(blind)}"
        return Finding(
            "shared files", "fail", text, "a run.dir on the cluster's shared file system, such as your home or scratch"
        )
    return Finding("shared files", "OK", f"{directory} is seen and written by {len(greetings)} node(s)")


def network(greetings: dict[int, dict[str, Any]], ways: dict[int, dict[str, Any]]) -> Finding:
    """Judge the way from each node to the first: reached, by which interface, not by the loopback."""
    first = greetings[0]["host"]
    problems = [
        f"{answer['host']} has no interface {answer['absent']}" for answer in greetings.values() if answer["absent"]
    ]
    for rank, greeting in greetings.items():
        way = ways.get(rank, {"error": "no answer"})
        if way["error"]:
            problems.append(f"{greeting['host']} cannot reach {first}: {way['error']}")
        elif way["address"].startswith("127."):
            problems.append(f"{greeting['host']} takes {first} for itself ({way['address']})")
    if problems:
        remedy = (
            "names in /etc/hosts, firewall between nodes; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface"
        )
        return Finding("network", "fail", "; ".join(problems), remedy)
    used = sorted({way["interface"] for way in ways.values()})
    if len(used) > 1:
        return Finding(
            "network", "warn", f"nodes use different interfaces: {', '.join(used)}", "set NCCL_SOCKET_IFNAME"
        )
    return Finding("network", "OK", f"{len(ways)} node(s) reach {first} by {used[0]}")


def clocks(tasks: Probe, greetings: dict[int, dict[str, Any]]) -> Finding:
    """Judge each node's clock against this machine's: of some questions, the quickest answer tells best."""
    best: dict[int, tuple[float, float]] = {}  # rank -> (half of the way there and back, how far ahead)
    for number in range(PINGS):
        sent = time.time()
        tasks.tell({"ping": number})
        for rank, (arrived, answer) in tasks.answers(ANSWER_SECONDS).items():
            half = (arrived - sent) / 2
            best[rank] = min(best.get(rank, (math.inf, 0.0)), (half, answer["time"] - sent - half))
    if len(best) < len(greetings):
        return Finding("clocks", "fail", "a node stopped answering", "try again")
    text = ", ".join(
        f"{greetings[rank]['host']} {ahead:+.3f} s (within {half:.3f})" for rank, (half, ahead) in best.items()
    )
    skew = max(abs(ahead) - half for half, ahead in best.values())
    remedy = "chronyd or ntpd on every node"
    if skew > SKEW_WARN_SECONDS:
        return Finding("clocks", "fail" if skew > SKEW_FAIL_SECONDS else "warn", text, remedy)
    return Finding("clocks", "OK", text)

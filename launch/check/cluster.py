"""What `launch doctor --slurm` checks: sbatch, the partitions, and an all-reduce on real nodes for some seconds.

The probe is `srun python -m launch.check.allreduce`, one task per node. Each task prints its host and versions, leaves
a file in the run directory and adds numbers up with the others. Invariant: the check waits a bounded time, and leaves
no job and no file behind.
"""

import json
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.check.checks import PROBE, ROOT, Finding
from train.config import Config

COMMAND_SECONDS, QUEUE_SECONDS, JOIN_SECONDS = 15, 30, 60
LOST = ("down", "drain", "fail")  # states of nodes


def ask(*command: str, seconds: float = COMMAND_SECONDS) -> tuple[bool, str]:
    """Run a Slurm command -> (whether it succeeded, what it printed). SIGTERM lets srun cancel its tasks."""
    limited = ("timeout", "--kill-after=10", str(seconds), *command)
    try:
        done = subprocess.run(limited, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stdout.strip() or f"{command[0]}: no answer, exit code {done.returncode}"


def slurm(config: Config, nodes: int, where: list[str]) -> Iterator[Finding]:
    """Check from sbatch to the nodes. Stop where the next check would make no sense."""
    works, text = ask("scontrol", "ping")
    if not works or "is UP" not in text:
        text = f"the controller does not answer: {text[:150]}"
        remedy = "run this on a login node; module load slurm; is slurmctld up? Is SLURM_CONF right?"
        yield Finding("sbatch", "fail", text, remedy)
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
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=config.run.dir) as shared:
        yield from probe(Path(shared).absolute(), nodes, where)


def partitions() -> Finding:
    """Check that a partition is up, and that its nodes are."""
    _, text = ask("sinfo", "-h", "-o", "%P|%a|%D|%T")
    rows = [line.split("|") for line in text.split() if line.count("|") == 3]
    up = [f"{name} {num} {state}" for name, is_up, num, state in rows if is_up == "up"]
    if not up:
        return Finding("partitions", "fail", f"none is up: {text[:100]}", "ask the cluster's administrators")
    is_lost = any(state.startswith(LOST) for _, _, _, state in rows)
    return Finding("partitions", "warn" if is_lost else "OK", ", ".join(up), "sinfo -R prints the reasons")


def probe(shared: Path, nodes: int, where: list[str]) -> Iterator[Finding]:
    """Run a task on each node and judge versions, file system and network."""
    limits = (f"--nodes={nodes}", "--ntasks-per-node=1", "--time=3", f"--immediate={QUEUE_SECONDS}")
    options = ("--job-name=doctor", "--label", "--kill-on-bad-exit=1", f"--chdir={ROOT}")
    arguments = ("--cpu", "--bytes", "4", "--timeout", str(JOIN_SECONDS), "--shared", str(shared))
    command = ("srun", *options, *limits, *where, *PROBE, *arguments)
    _, output = ask(*command, seconds=QUEUE_SECONDS + 2 * JOIN_SECONDS)
    tasks = read_tasks(output)
    num_started = sum("host" in task for task in tasks)
    if num_started < nodes:
        is_busy = "mmediate" in output or "Unable to allocate" in output
        remedy = "the cluster is busy: try again, or fewer --nodes" if is_busy else f"is {PROBE[0]} on every node?"
        text = f"{num_started} of {nodes} node(s) ran a probe: {output.splitlines()[-1][:150]}"
        yield Finding("nodes", "warn" if is_busy else "fail", text, remedy)
        return
    yield versions(tasks)
    yield shared_files(shared, tasks)
    yield network(tasks)


def read_tasks(output: str) -> list[dict[str, Any]]:
    """Return what each task printed: its JSON objects as one, and its error, or else its last other line, as `said`."""
    tasks: dict[str, dict[str, Any]] = defaultdict(dict)
    for label, text in re.findall(r"^ *(\d+): (.*\S)", output, re.MULTILINE):
        if text.startswith('{"'):
            tasks[label] |= json.loads(text)
        elif not tasks[label].get("said", "").startswith("error: "):  # torch prints stack traces around it
            tasks[label]["said"] = text
    return list(tasks.values())


def versions(tasks: list[dict[str, Any]]) -> Finding:
    """Compare the versions on the nodes."""
    found = {task["host"]: ", ".join(task["versions"]) for task in tasks}
    if len(set(found.values())) == 1:
        return Finding("nodes", "OK", f"{len(tasks)} node(s) with the same versions: {next(iter(found.values()))}")
    text = "; ".join(f"{host}: {versions}" for host, versions in found.items())
    return Finding("nodes", "fail", f"different versions: {text}", "install the same environment on every node")


def shared_files(shared: Path, tasks: list[dict[str, Any]]) -> Finding:
    """Check that every node could write into the run directory, and that its file is seen here."""
    missing = {task["host"]: task["problem"] for task in tasks if not (shared / task["host"]).exists()}
    if not missing:
        return Finding("shared files", "OK", f"{shared.parent} is shared by {len(tasks)} node(s)")
    why = ", ".join(f"{host} ({problem or 'its file is not seen here'})" for host, problem in missing.items())
    remedy = "a run.dir on the cluster's shared file system, such as your home or scratch"
    return Finding("shared files", "fail", f"{shared.parent} is not shared: {why}", remedy)


def network(tasks: list[dict[str, Any]]) -> Finding:
    """Check the sums that the nodes found, or why they found none."""
    remedy = "names in /etc/hosts; firewall between nodes; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface"
    silent = [task for task in tasks if "wrong" not in task]
    if silent:
        said = [f"{task['host']}: {task['said'][:220]}" for task in silent if "said" in task]
        return Finding("network", "fail", "; ".join(said) or f"{len(silent)} node(s) did not answer", remedy)
    if wrong := sum(task["wrong"] for task in tasks):
        return Finding("network", "fail", f"{wrong} wrong sums", remedy)
    seconds = max(task["seconds"]["4"] for task in tasks)
    return Finding("network", "OK", f"{len(tasks)} node(s) add up right, 4 bytes in {seconds * 1e6:,.0f} us")

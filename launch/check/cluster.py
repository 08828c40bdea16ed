"""What `launch doctor --slurm` checks: sbatch, the partitions, an all-reduce on real nodes, and a preemption.

The probe is `srun python -m launch.check.allreduce`, one task per node. Each task prints its host and versions, leaves
a file in the run directory and adds numbers up with the others. Then a small training gets the signal of a preemption
through Slurm. Invariant: the check waits a bounded time, and leaves no job and no file behind.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.check.checks import PROBE, ROOT, Finding
from launch.check.selftest import QUIET
from train.config import Config
from train.errors import PREEMPTED
from train.rundir import RunDir, Tail

COMMAND_SECONDS, QUEUE_SECONDS, JOIN_SECONDS = 15, 30, 60
LOST = ("down", "drain", "fail")  # states of nodes
STEPS = 100  # of the training that is preempted
TRAINING = f"""
--data.name digits --model.name tiny --train.global_batch_size 64 --train.exact true --train.num_micro_batches 8
--train.num_threads 1 --train.max_steps {STEPS} --eval.every_steps {STEPS} --checkpoint.every_steps {STEPS}
--train.device cpu
""".split()
# As slurm/train.sbatch starts a rank. The signal goes to the step that is printed.
RANK = 'trap "" USR2; [ "$SLURM_PROCID" != 0 ] || echo "step $SLURM_JOB_ID.$SLURM_STEP_ID"; exec "$@"'
SLOW = """
import sys, time, train.__main__, train.loop
prepare = train.loop.prepare_step
train.loop.prepare_step = lambda *arguments: (time.sleep(0.1), prepare(*arguments))
train.__main__.leave(train.__main__.main(sys.argv[1:]))
"""


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
        found = list(probe(Path(shared).absolute(), nodes, where))
        yield from found
        if all(finding.status == "OK" for finding in found):
            yield preemption(Path(shared).absolute(), min(nodes, 2), where)


def partitions() -> Finding:
    """Check that a partition is up, and that its nodes are."""
    _, text = ask("sinfo", "-h", "-o", "%P|%a|%D|%T")
    rows = [line.split("|") for line in text.split() if line.count("|") == 3]
    up = [f"{name} {num} {state}" for name, is_up, num, state in rows if is_up == "up"]
    if not up:
        return Finding("partitions", "fail", f"none is up: {text[:100]}", "ask the cluster's administrators")
    is_lost = any(state.startswith(LOST) for _, _, _, state in rows)
    return Finding("partitions", "warn" if is_lost else "OK", ", ".join(up), "sinfo -R prints the reasons")


def srun(nodes: int, where: list[str]) -> tuple[str, ...]:
    """Return the command that runs one task on each of some nodes, in a job of its own, if they are free soon."""
    limits = ("--time=3", f"--immediate={QUEUE_SECONDS}", f"--chdir={ROOT}")
    return ("srun", "--job-name=doctor", f"--nodes={nodes}", "--ntasks-per-node=1", *limits, *where)


def probe(shared: Path, nodes: int, where: list[str]) -> Iterator[Finding]:
    """Run a task on each node and judge versions, file system and network."""
    arguments = ("--cpu", "--bytes", "4", "--timeout", str(JOIN_SECONDS), "--shared", str(shared))
    command = (*srun(nodes, where), "--label", "--kill-on-bad-exit=1", *PROBE, *arguments)
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


def preemption(shared: Path, nodes: int, where: list[str]) -> Finding:
    """Send USR2 through Slurm, as `sbatch --signal=USR2@300` does: a training must save, exit, and resume exactly."""
    began, seconds = time.monotonic(), QUEUE_SECONDS + 2 * JOIN_SECONDS
    hit, undisturbed = RunDir(shared / "hit"), RunDir(shared / "undisturbed")

    def train(run: RunDir, *program: str) -> tuple[str, ...]:
        place = ("--run.dir", str(shared), "--run.name", run.name)
        return ("bash", "-c", RANK, "rank", sys.executable, *program, *TRAINING, *QUIET, *place)

    code, output = preempt((*srun(nodes, where), "--kill-on-bad-exit=0", *train(hit, "-c", SLOW)), hit, seconds)
    saved = [row["step"] for row in hit.read_rows() if row["event"] == "preempted"]
    remedy = "does a wrapper, container or prolog between srun and python keep signals? Try LOCKSTEP_SRUN without it"
    if code != PREEMPTED or len(saved) != 1:
        text = f"a training that Slurm sent USR2 ended with exit code {code}, expected {PREEMPTED} and a checkpoint"
        return Finding("preemption", "fail", f"{text}: {output[-150:]}", remedy)
    for run, num_nodes in ((hit, nodes), (undisturbed, 1)):
        works, output = ask(*srun(num_nodes, where), *train(run, "-m", "train"), seconds=seconds)
        if not works:
            return Finding("preemption", "fail", f"saved at step {saved[0]}, then: {output[-200:]}", "see the error")
    starts = [row["step"] for row in hit.read_rows() if row["event"] == "start"]
    if starts != [0, saved[0]]:
        return Finding("preemption", "fail", f"saved at step {saved[0]}, but started at {starts}", "is run.dir shared?")
    hashes = {summary and summary.weights_sha256 for summary in (hit.read_summary(), undisturbed.read_summary())}
    if len(hashes) != 1 or None in hashes:
        text = f"resumed at step {saved[0]}, but to other bits than an undisturbed run on one node"
        return Finding(
            "preemption", "fail", text, "nodes of one kind (--constraint): exact mode needs the same processors"
        )
    text = f"USR2 through Slurm: saved at step {saved[0]}, resumed to the same bits, {time.monotonic() - began:.0f} s"
    return Finding("preemption", "OK", text)


def preempt(command: tuple[str, ...], run: RunDir, seconds: float) -> tuple[int, str]:
    """Start a training by srun, and send USR2 to its step while it trains -> (exit code, what it printed)."""
    with tempfile.TemporaryFile("a+") as output:
        limited = ("timeout", "--kill-after=10", str(seconds), *command)
        process, tail = subprocess.Popen(limited, stdout=output, stderr=subprocess.STDOUT), Tail(run.metrics)
        try:
            while process.poll() is None and not any(row["event"] == "train" for row in tail.rows()):
                time.sleep(0.1)
            output.seek(0)
            if step := re.search(r"^step (\S+)", output.read(), re.MULTILINE):
                ask("scancel", "--signal=USR2", step[1])
            code = process.wait()
        finally:
            process.terminate()  # timeout passes it on to srun, which cancels its job
        output.seek(0)
        return code, output.read().strip()

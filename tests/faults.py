"""Run the long fault campaigns from a seed: `python tests/faults.py WHAT`. A sample of them is in test_faults.py.

kills         kill -9 a random rank at any moment, in a save, in an evaluation or at the start (single processes,
              two ranks, torchrun, launch run). Resume each to its end and compare it with the undisturbed run
elastic       kill workers under torchrun --max-restarts and measure how long until they train again; kill agents and
              measure how long until no orphan is left
crash-points  kill a process at every system call that writes a checkpoint
long          train many steps on two ranks and measure slopes of memory, descriptors, threads, step time and disk
nodes         lose and return nodes of a real Slurm under jobs that may shrink (needs root, see slurm/lab.py)
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ranks import crashes, endurance  # noqa: E402
from ranks.processes import Ranks, arguments, rows  # noqa: E402

from slurm import losses  # noqa: E402
from train.world.clock import Record  # noqa: E402

EVERY_STEPS = 5  # checkpoint.every_steps
FLAGS = (
    "--model.name tiny_bn --train.num_micro_batches 2 --model.dropout 0.2 --augment.shift 2 --optim.ema 0.9 "
    f"--log.every_steps 1 --checkpoint.every_steps {EVERY_STEPS} --eval.every_steps 10 --optim.lr 0.05"
)
STEPS = {"one process": 150, "two ranks": 150, "torchrun": 600, "launch run": 600}
SHARES = {"one process": 0.4, "two ranks": 0.3, "torchrun": 0.15, "launch run": 0.15}
MOMENTS = {"any": 0.4, "save": 0.3, "evaluate": 0.15, "start": 0.15}
KILLS_PER_RUN = 10
WAIT_SECONDS = 120


def world_size(way: str) -> int:
    """Return the number of ranks for a way of starting."""
    return 1 if way == "one process" else 2


class Training:
    """A training that can be started again: ranks of the fork server, or a launcher that restarts them itself."""

    def __init__(self, way: str, run: Path, steps: int) -> None:
        self.way, self.run, self.logs = way, run, run.parent / f"{run.name}-logs"
        self.arguments = arguments(run, FLAGS, f"--train.max_steps {steps}")
        self.ranks: Ranks | None = None
        self.launcher: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        """Start the ranks, or their launcher."""
        if self.way in ("one process", "two ranks"):
            self.ranks = Ranks(world_size(self.way), self.arguments, self.logs)
            return
        own = ["-m", "launch", "run", "--nproc", "2", "--max-restarts", "1000", "--"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1000"]
        command = [*torchrun, "--monitor-interval", "0.2", "-m", "train"] if self.way == "torchrun" else own
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        environment |= {"WANDB_MODE": "disabled"}
        self.logs.mkdir(parents=True, exist_ok=True)
        with open(self.logs / "launcher.log", "ab") as log:
            line = [sys.executable, *command, *self.arguments]
            self.launcher = subprocess.Popen(line, env=environment, stdout=log, stderr=log, cwd=ROOT)

    def records(self) -> list[Record]:
        """Return where the running ranks are, from their own records."""
        found = []
        for rank in range(world_size(self.way)):
            with suppress(OSError, ValueError, LookupError):
                record = Record.unpack(rank, (self.run / ".ranks" / f"rank-{rank}").read_bytes())
                os.kill(record.pid, 0)
                found.append(record)
        return found

    def is_over(self) -> bool:
        """Return whether all processes have ended."""
        if self.launcher:
            return self.launcher.poll() is not None
        assert self.ranks
        return not any(process.is_alive() for process in self.ranks.processes)

    def wait(self) -> None:
        """Wait until all processes have ended; kill those that have not."""
        if self.launcher:
            try:
                self.launcher.wait(WAIT_SECONDS * 5)
            finally:
                self.launcher.kill()
        elif self.ranks:
            self.ranks.wait(WAIT_SECONDS)

    def output(self) -> str:
        """Return the end of what its processes printed."""
        return "".join(path.read_text()[-3000:] for path in sorted(self.logs.glob("*.log")))

    def pids(self) -> set[int]:
        """Return the processes that train this run: by their command line, or those of the fork server."""
        if self.ranks:
            return {process.pid for process in self.ranks.processes if process.is_alive() and process.pid}
        name = self.run.name.encode()
        found = set()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = path.read_bytes().split(b"\0")
                is_launcher = int(path.parent.name) == (self.launcher and self.launcher.pid)
                if name in words and b"train" in words and not is_launcher:
                    found.add(int(path.parent.name))
        return found


def last_step(run: Path) -> int:
    """Return the last step that a run has logged."""
    return max((row["step"] for row in rows(run, "train")), default=0)


def reach(training: Training, moment: str, rng: random.Random, killed: set[int]) -> list[Record]:
    """Wait for a moment of an attempt; return where its ranks are, or nothing if it ended before."""
    step = last_step(training.run) + rng.randint(1, 40)
    pause = rng.uniform(0, 0.03) if moment != "any" else rng.uniform(0, 0.5)
    deadline = time.monotonic() + WAIT_SECONDS
    while not training.is_over() and time.monotonic() < deadline:
        found = [record for record in training.records() if record.pid not in killed]
        if len(found) == world_size(training.way):
            phases = {record.phase for record in found}
            there = moment in phases if moment == "start" else any(record.step >= step for record in found)
            if there and moment in (*phases, "any"):
                time.sleep(pause)
                return [record for record in training.records() if record.pid not in killed]
        time.sleep(0.0005)
    assert training.is_over(), f"{training.run} hangs\n{training.output()}"
    return []


def recover(training: Training, before: set[int]) -> float:
    """Wait until ranks that are all new have begun a step; return the seconds it took."""
    began = time.monotonic()
    if training.ranks:
        training.ranks.wait(WAIT_SECONDS)  # the other rank notices and ends
        training.start()
    while time.monotonic() < began + WAIT_SECONDS:
        found = training.records()
        is_new = len(found) == world_size(training.way) and not {record.pid for record in found} & before
        if training.is_over() or (is_new and all(record.step for record in found)):
            return time.monotonic() - began
        time.sleep(0.005)
    raise AssertionError(f"{training.run} did not recover in {WAIT_SECONDS} s")


def disturb(training: Training, rng: random.Random, kills: int) -> list[dict[str, Any]]:
    """Kill ranks of one training until it has ended or was killed `kills` times; return a row per kill."""
    found, dead = [], set[int]()
    while len(found) < kills:
        moment = rng.choices([*MOMENTS], [*MOMENTS.values()])[0]
        records = reach(training, moment, rng, dead)
        if not records:
            break
        victim = rng.choice(records)
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
        dead |= {record.pid for record in records}
        row = {"way": training.way, "moment": moment, "rank": victim.rank, "phase": victim.phase, "step": victim.step}
        starts = len(rows(training.run, "start"))
        reached = last_step(training.run)
        row["seconds"] = recover(training, dead)
        resumed = [row["step"] for row in rows(training.run, "start")][starts:]
        row["recomputed"] = max(reached - resumed[0], 0) if resumed and moment != "start" else 0
        found.append(row)
    return found


def examine(training: Training, expected: dict[str, Any], steps: int) -> dict[str, int]:
    """Let a disturbed training end; count what is wrong with what it left."""
    for _ in range(5):
        training.wait()
        summary = training.run / "summary.json"
        if training.launcher or (summary.exists() and json.loads(summary.read_text())["outcome"] == "finished"):
            break
        training.start()
    else:
        raise AssertionError(f"{training.run} does not end\n{training.output()}")
    deadline = time.monotonic() + 5
    while training.pids() and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [
        path.name for path in training.run.rglob("*") if "writing" in path.name or path.name in (".ranks", "verdict")
    ]
    logged = Counter(row["step"] for row in rows(training.run, "train"))
    names = ("weights_sha256", "ema_weights_sha256", "results")
    found = json.loads((training.run / "summary.json").read_text())
    return {
        "runs": 1,
        "other bits": any(found[name] != expected[name] for name in names),
        "doubled steps": sum(count > 1 for count in logged.values()),
        "missing steps": steps - len(logged),
        "temporaries": len(left),
        "orphans": len(training.pids()),
    }


def kills(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Run the kill campaign."""
    rng, done, totals, per_kill = random.Random(options.seed), Counter[str](), Counter[str](), []
    expected: dict[str, dict[str, Any]] = {}
    for way in options.ways or SHARES:
        wanted = round(options.kills * (SHARES[way] if not options.ways else 1 / len(options.ways)))
        steps = STEPS[way]
        key = f"{world_size(way)}-{steps}"
        if key not in expected:
            alone = "two ranks" if world_size(way) == 2 else "one process"
            whole = Training(alone, place / f"undisturbed-{key}", steps)
            whole.wait()
            expected[key] = json.loads((whole.run / "summary.json").read_text())
        number = 0
        while done[way] < wanted:
            number += 1
            training = Training(way, place / f"{way.replace(' ', '-')}-{number}", steps)
            found = disturb(training, rng, min(KILLS_PER_RUN, wanted - done[way]))
            per_kill += found
            done[way] += len(found)
            totals.update({name: int(count) for name, count in examine(training, expected[key], steps).items()})
            print(f"{way}: {done[way]} of {wanted} kills, {dict(totals)}", file=sys.stderr, flush=True)
    return {"totals": dict(totals), "kills": per_kill}


def kills_table(result: dict[str, Any]) -> str:
    """Return one line per way and moment, and the totals."""
    groups = defaultdict(list)
    for row in result["kills"]:
        groups[row["way"], row["moment"]].append(row)
    lines = [
        "| started by | moment | kills | steps computed again, most | seconds until training again: median, most |",
        "|---|---|---|---|---|",
    ]
    for (way, moment), found in sorted(groups.items()):
        seconds = [row["seconds"] for row in found]
        again = max(row["recomputed"] for row in found)
        lines.append(
            f"| {way} | {moment} | {len(found)} | {again} | {statistics.median(seconds):.1f}, {max(seconds):.1f} |"
        )
    totals = ", ".join(f"{n} {what}" for what, n in result["totals"].items())
    return "\n".join([*lines, "", f"{len(result['kills'])} kills; {totals}"])


def elastic(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Kill workers and agents of torchrun."""
    rng = random.Random(options.seed)
    found, number = [], 0
    while len(found) < options.kills:
        number += 1
        training = Training("torchrun", place / f"elastic-{number}", 5000)
        found += disturb(training, rng, options.kills - len(found))
        assert training.launcher
        training.launcher.terminate()
        training.wait()
    ends = []
    for number in range(options.agents):
        training = Training("torchrun", place / f"agent-{number}", 100_000)
        reach(training, "any", rng, set())
        assert training.launcher
        workers, began = training.pids(), time.monotonic()
        training.launcher.kill()
        training.launcher.wait()
        while training.pids() and time.monotonic() < began + 60:
            time.sleep(0.01)
        ends.append({"workers": len(workers), "seconds": time.monotonic() - began, "left": len(training.pids())})
        for pid in training.pids():
            os.kill(pid, signal.SIGKILL)
    return {"kills": found, "agents": ends}


def elastic_table(result: dict[str, Any]) -> str:
    """Return the outcome in two sentences."""
    seconds, ends = [row["seconds"] for row in result["kills"]], [row["seconds"] for row in result["agents"]]
    lines = [f"{sum(s <= 10 for s in seconds)} of {len(seconds)} killed workers: training again within 10 s "
             f"(median {statistics.median(seconds):.1f} s, most {max(seconds):.1f} s)"]  # fmt: skip
    if ends:
        lines += [
            f"{sum(s <= 5 for s in ends)} of {len(ends)} killed agents: no orphan after 5 s (most {max(ends):.2f} s)"
        ]
    return "\n".join(lines)


def is_good(what: str, result: dict[str, Any]) -> bool:
    """Return whether a campaign found nothing wrong."""
    if what == "kills":
        wrong = sum(count for name, count in result["totals"].items() if name != "runs")
        return not wrong and all(row["recomputed"] <= EVERY_STEPS for row in result["kills"])
    if what == "elastic":
        ends = all(row["seconds"] <= 5 and not row["left"] for row in result["agents"])
        return ends and all(row["seconds"] <= 10 for row in result["kills"])
    if what == "nodes":
        return losses.is_good(result)
    return not result["problems"] if what == "crash-points" else result["codes"] == [0, 0]


CAMPAIGNS: dict[str, Any] = {
    "kills": (kills, kills_table), "elastic": (elastic, elastic_table),
    "crash-points": (crashes.campaign, crashes.table), "long": (endurance.campaign, endurance.table),
    "nodes": (losses.campaign, losses.table),
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Run campaigns; return 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*CAMPAIGNS])
    parser.add_argument("--kills", type=int, default=200, help="of kills and elastic; nodes loses a tenth as many")
    parser.add_argument("--agents", type=int, default=5, help="agents to kill in elastic")
    parser.add_argument("--ways", nargs="+", choices=[*SHARES], help="of kills: only these, in equal shares")
    parser.add_argument("--steps", type=int, default=100_000, help="of long")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between the samples of long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    results, good = {}, True
    for what in options.what:
        campaign, table = CAMPAIGNS[what]
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="lockstep-faults-") as place:
            os.environ.setdefault("XDG_CACHE_HOME", str(Path(place).parent / "lockstep-faults-cache"))
            results[what] = campaign(options, Path(place))
        good &= is_good(what, results[what])
        print(
            f"## {what}, seed {options.seed}, {time.monotonic() - began:.0f} s\n\n{table(results[what])}\n", flush=True
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

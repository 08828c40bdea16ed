"""A campaign of random losses and returns of nodes under jobs that were submitted with a range of nodes."""

import argparse
import json
import random
import re
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from ranks.processes import rows

from slurm.cluster import TRAIN, WAIT_SECONDS, Cluster, running

NODES, LEAST = 4, 2
STEPS, EVERY_STEPS = 200, 10
FLAGS = ["--train.max_steps", str(STEPS), "--checkpoint.every_steps", str(EVERY_STEPS)]
PACE = "0.15"  # seconds per step


def noticed_at(cluster: Cluster, job: str, node: str, since: float) -> float:
    """Return when Slurm took a lost node from the job; infinity if it has not."""
    pattern = rf"\[(.*?)\] error: Removing failed node {node} from JobId={job}\b"
    log = (cluster.lab.place / "slurmctld.log").read_text()
    times = [datetime.fromisoformat(text).timestamp() for text in re.findall(pattern, log)]
    return min((at for at in times if at > since), default=float("inf"))


class Losses:
    """One job, and what happens to its nodes."""

    def __init__(self, cluster: Cluster, name: str, rng: random.Random) -> None:
        self.cluster, self.run, self.rng = cluster, cluster.path(name), rng
        self.returns: list[tuple[float, str]] = []
        env = {"SECONDS_PER_STEP": PACE, "SECONDS_PER_STEP_ALWAYS": PACE}
        arguments = ["--nodes", f"{LEAST}-{NODES}", "--", *TRAIN, *FLAGS, "--run.name", name]
        code, output = cluster.launch(*arguments, LOCKSTEP_ATTEMPTS="20", **env)
        assert code == 0, output
        self.job = output.split("job ")[1].split(":")[0]
        self.alone_at, self.seconds_of_two = time.time(), 0.0

    def look(self) -> tuple[int, int, int]:
        """Return the attempts so far, the step that the last one resumed from and its last step; bring nodes back."""
        for at, node in list(self.returns):
            if time.time() > at:
                self.cluster.bring_back(node)
                self.returns.remove((at, node))
        if len(list(self.run.glob("checkpoints/.writing-*"))) < 2:
            self.alone_at = time.time()
        self.seconds_of_two = max(self.seconds_of_two, time.time() - self.alone_at)
        time.sleep(0.1)
        attempts, begun, last = 0, 0, -1
        for row in rows(self.run):
            if row["event"] == "start":
                attempts, begun, last = attempts + 1, row["step"], -1
            elif row["event"] == "train":
                last = row["step"]
        return attempts, begun, last

    def is_over(self) -> bool:
        return self.cluster.job(self.job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def train_for(self, seconds: float) -> None:
        """Let the current attempt train for some seconds after its first step."""
        deadline = time.time() + WAIT_SECONDS
        while self.look()[2] < 0 and not self.is_over():
            assert time.time() < deadline, self.cluster.log(self.job)
        until = time.time() + seconds
        while time.time() < until:
            self.look()

    def nodes(self) -> list[str]:
        """Return the nodes of the last attempt, the first one with the batch script in front."""
        last = re.findall(r"node\(s\) (\S+), \d+ rank", self.cluster.log(self.job))[-1]
        return self.cluster.run("scontrol", "show", "hostnames", last).split()

    def lose(self) -> dict[str, Any] | None:
        """Lose a node; return what followed, or None if the job had ended."""
        nodes, how = self.nodes(), self.rng.choice(["kill", "netdown"])
        node = self.rng.choice(nodes)
        before, _, reached = self.look()
        restarts = self.cluster.job(self.job)["Restarts"]
        if self.is_over():
            return None
        known = len(self.cluster.log(self.job))
        getattr(self.cluster.lab, how)(node)
        lost_at = time.time()
        noticed, deadline = float("inf"), lost_at + WAIT_SECONDS
        while True:
            attempts, begun, last = self.look()
            if noticed == float("inf"):
                is_named = f"lost {node};" in self.cluster.log(self.job)[known:]
                noticed = time.time() if is_named else noticed_at(self.cluster, self.job, node, lost_at)
                if noticed < float("inf"):  # a node that is back before that is not lost: the job is requeued
                    self.returns.append((time.time() + self.rng.uniform(0, 20), node))
            if attempts == before:
                reached = max(reached, last)
            elif last > 0:
                break
            if self.is_over():
                return None
            assert time.time() < deadline, f"{node} {how}\n{self.cluster.log(self.job)}"
        again_at = next(r["time"] for r in rows(self.run, "train") if r["step"] == begun + 1)
        noticed = min(noticed, noticed_at(self.cluster, self.job, node, lost_at))
        return {
            "how": how,
            "left": len(nodes) - 1,
            "first": node == nodes[0],
            "requeued": self.cluster.job(self.job)["Restarts"] != restarts,
            "notice_seconds": noticed - lost_at,
            "seconds": again_at - noticed,
            "recomputed": max(reached, 0) - begun,
        }

    def examine(self, sha256: str) -> dict[str, int]:
        """Wait for the end of the job; count what is wrong."""
        deadline = time.time() + WAIT_SECONDS
        while not self.is_over():
            self.look()
            assert time.time() < deadline, self.cluster.log(self.job)
        state = self.cluster.job(self.job)["JobState"]
        assert state == "COMPLETED", f"{self.run.name}: {state}\n{self.cluster.log(self.job)}"
        summary = json.loads((self.run / "summary.json").read_text())
        logged = [row["step"] for row in rows(self.run, "train")]
        return {
            "runs": 1,
            "other bits": summary["weights_sha256"] != sha256,
            "doubled or missing steps": logged != list(range(1, STEPS + 1)),
            "second writers": self.seconds_of_two > 5,  # a new one first makes its directory, then moves the old one
            "temporaries": len(list(self.run.rglob(".*"))),
        }


def campaign(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Lose a tenth of --kills nodes."""
    rng, found, totals = random.Random(options.seed), list[dict[str, Any]](), dict[str, int]()
    with running(place, NODES) as cluster:
        whole = cluster.submit("undisturbed", flags=tuple(FLAGS))
        cluster.wait(whole, "COMPLETED")
        sha256 = json.loads((cluster.path("undisturbed") / "summary.json").read_text())["weights_sha256"]
        while len(found) < options.kills // 10:
            losses = Losses(cluster, f"losses-{totals.get('runs', 0) + 1}", rng)
            while not losses.is_over() and len(found) < options.kills // 10:
                losses.train_for(rng.uniform(1, 5))
                if row := losses.lose():
                    found.append(row)
                    print(row, file=sys.stderr, flush=True)
                    if row["requeued"] != has_to_requeue(row):
                        print(cluster.log(losses.job), file=sys.stderr, flush=True)
            for name, count in losses.examine(sha256).items():
                totals[name] = totals.get(name, 0) + int(count)
            print(totals, file=sys.stderr, flush=True)
            cluster.tidy()
    return {"totals": totals, "losses": found}


def has_to_requeue(row: dict[str, Any]) -> bool:
    """Return whether too little was left to continue in the allocation after a loss."""
    return row["first"] or row["left"] < LEAST


def is_good(result: dict[str, Any]) -> bool:
    """Return whether nothing was wrong, and each job continued inside its allocation if it could."""
    wrong = sum(count for name, count in result["totals"].items() if name != "runs")
    return not wrong and all(
        row["recomputed"] <= EVERY_STEPS
        and row["requeued"] == has_to_requeue(row)
        and (row["requeued"] or row["seconds"] <= 30)
        for row in result["losses"]
    )


def table(result: dict[str, Any]) -> str:
    """Return one line per kind of loss, and the totals."""
    lines = [
        "| nodes lost | losses | seconds until noticed: median, most | seconds from then to a new step: median, "
        "most | steps computed again, most |",
        "|---|---|---|---|---|",
    ]
    for how in ("kill", "netdown"):
        for requeued in (False, True):
            same = [row for row in result["losses"] if (row["how"], row["requeued"]) == (how, requeued)]
            if same:
                notice, again = [r["notice_seconds"] for r in same], [r["seconds"] for r in same]
                what = f"{'power failure' if how == 'kill' else 'silence'}, {'requeued' if requeued else 'continued'}"
                lines.append(
                    f"| {what} | {len(same)} | {statistics.median(notice):.1f}, {max(notice):.1f} | "
                    f"{statistics.median(again):.1f}, {max(again):.1f} | {max(r['recomputed'] for r in same)} |"
                )
    return "\n".join([*lines, "", ", ".join(f"{count} {name}" for name, count in result["totals"].items())])

"""Run commands, each with a time limit and all with one deadline, and keep their outcomes in one receipt."""

import contextlib
import functools
import json
import os
import shlex
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.run import die_with_parent

SCHEMA = 1
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
MIN_SECONDS = 5.0  # with less time left, nothing is started
POLL_SECONDS = 0.05
NO_TIME = "no time left"


class CannotRun(Exception):
    """A check needs something that is missing. The message names it."""


class Failed(Exception):
    """A check does not hold. The message gives the reason."""


@dataclass
class Job:
    """One row of the visit: a command, or a function that returns the row's last line."""

    name: str
    limit: float
    work: list[str] | Callable[[], str]
    env: dict[str, str] = field(default_factory=dict)
    why_not: str = ""  # why it cannot run on this machine
    after: str = ""  # the job that must succeed first


@dataclass
class Row:
    """The outcome of a job."""

    name: str
    stage: str
    outcome: str = "-"  # ok, FAIL, or - for a job that did not run to its end
    seconds: float = 0.0
    note: str = "not reached"  # the last line of its output, or why it did not run
    limit: float = 0.0
    command: str = ""
    checks: list[dict[str, Any]] = field(default_factory=list)  # lines of JSON that it printed


@dataclass
class Started:
    """A running command."""

    process: subprocess.Popen
    row: Row
    log: Path
    began: float
    stop_at: float
    stopped_at: float | None = None  # when it was sent SIGTERM

    def signal(self, number: int) -> None:
        """Send a signal to the command and to all that it started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def read_log(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return the last line of a log that is neither indented nor JSON, and the checks among its lines."""
    last, checks = "", []
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith('{"check"'):
            with contextlib.suppress(ValueError):  # cut off by a kill
                checks.append(json.loads(line))
        elif line.strip() and not line.startswith("  "):
            last = line
    return last, checks


class Visit:
    """The rows of a visit in their order, and its files in `output`."""

    def __init__(self, output: Path, work: Path, seconds: float, facts: dict[str, Any] | None = None) -> None:
        self.output, self.work, self.logs = output, work, work / "logs"
        self.began = time.monotonic()
        self.end = self.began + seconds
        self.rows: list[Row] = []
        self.receipt: dict[str, Any] = {"schema": SCHEMA, "outcome": "interrupted", **(facts or {})}
        self.logs.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        self.write()

    def plan(self, stage: str, jobs: list[Job]) -> list[tuple[Job, Row]]:
        """Add a row per job, so that the receipt also names jobs that are never reached."""
        planned = []
        for job in jobs:
            command = shlex.join(job.work) if isinstance(job.work, list) else ""
            row = Row(job.name, stage, limit=job.limit, command=command)
            if job.why_not:
                row.note = job.why_not
            planned.append((job, row))
        self.rows += [row for _, row in planned]
        return planned

    def run(self, planned: list[tuple[Job, Row]], at_once: int = 1) -> None:
        """Run jobs side by side, at most `at_once`; return when all have ended."""
        waiting = [(job, row) for job, row in planned if not job.why_not]
        running: list[Started] = []
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job, row = waiting.pop(0)
                    if job.after and not any(each.outcome == "ok" for each in self.rows if each.name == job.after):
                        row.note = f"needs {job.after}, which is not ok"
                    elif self.end - time.monotonic() < MIN_SECONDS:
                        row.note = NO_TIME
                    elif isinstance(job.work, list):
                        running.append(self._start(job, job.work, row))
                    else:
                        self._call(job.work, row)
                running = [each for each in running if not self._has_ended(each)]
                time.sleep(POLL_SECONDS)
        finally:
            for each in running:
                each.signal(signal.SIGKILL)
                each.process.wait()
                each.row.note = "interrupted"
            self.write()

    def _start(self, job: Job, command: list[str], row: Row) -> Started:
        path, now = self.logs / f"{job.name}.log", time.monotonic()
        with path.open("wb") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, **job.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )
        row.note = "interrupted"
        return Started(process, row, path, now, min(now + job.limit, self.end))

    def _has_ended(self, started: Started) -> bool:
        """Stop a command that is over its limit. Once it has ended, fill in its row."""
        code, now, row = started.process.poll(), time.monotonic(), started.row
        if code is None:
            if now < started.stop_at:
                return False
            if started.stopped_at is None:
                started.stopped_at = now
                started.signal(signal.SIGTERM)
            if now < min(started.stopped_at + GRACE_SECONDS, self.end):
                return False
        started.signal(signal.SIGKILL)  # also processes that an ended command has left behind
        started.process.wait()
        last, row.checks = read_log(started.log)
        row.seconds = round(now - started.began, 1)
        if started.stopped_at is None:
            row.outcome, row.note = ("FAIL", f"exit code {code}: {last}") if code else ("ok", last)
        elif started.stop_at < self.end:
            row.outcome, row.note = "FAIL", f"did not end within {row.limit:g} s: {last}"
        else:
            row.note = f"{NO_TIME}: stopped after {row.seconds:g} s"
        self.write()
        return True

    def _call(self, work: Callable[[], str], row: Row) -> None:
        began = time.monotonic()
        try:
            row.outcome, row.note = "ok", work()
        except CannotRun as reason:
            row.outcome, row.note = "-", str(reason)
        except Failed as reason:
            row.outcome, row.note = "FAIL", str(reason)
        row.seconds = round(time.monotonic() - began, 1)

    @property
    def failed(self) -> list[Row]:
        """The rows that failed."""
        return [row for row in self.rows if row.outcome == "FAIL"]

    def write(self, outcome: str = "interrupted") -> None:
        """Write the receipt as it is now. `outcome` is the state of the visit."""
        counts = {
            name: sum(row.outcome == mark for row in self.rows) for name, mark in (("ok", "ok"), ("failed", "FAIL"))
        }
        self.receipt |= {
            "outcome": outcome,
            "seconds": round(time.monotonic() - self.began, 1),
            "counts": {**counts, "did_not_run": len(self.rows) - sum(counts.values())},
            "rows": [vars(row) for row in self.rows],
            "speeds": [check for row in self.rows for check in row.checks if "us" in check],
            "trainings": trainings(self.work),
        }
        partial = self.output / ".receipt.json"
        partial.write_text(json.dumps(self.receipt, indent=1) + "\n")
        partial.replace(self.output / "receipt.json")

    def pack_logs(self) -> None:
        """Put all logs into logs.tgz, next to the receipt."""
        with tarfile.open(self.output / "logs.tgz", "w:gz") as archive:
            archive.add(self.logs, "logs")


BRIEF = [
    "outcome", "step", "world_size", "device", "precision", "exact", "num_micro_batches",
    "warm_up_seconds", "train_seconds", "wall_seconds", "images_per_second",
    "weights_sha256", "ema_weights_sha256",
]  # fmt: skip


def trainings(work: Path) -> list[dict[str, Any]]:
    """Return a short summary of each training in `work`."""
    found = []
    for path in sorted(work.glob("*/summary.json")):
        with contextlib.suppress(ValueError):
            summary = json.loads(path.read_text())
            prints = (summary.get("fingerprints") or {}).get("sha256")
            brief = {name: summary[name] for name in BRIEF if name in summary}
            accuracy = {name: result["accuracy"] for name, result in summary.get("results", {}).items()}
            found.append({"name": path.parent.name, **brief, "accuracy": accuracy, "fingerprints_sha256": prints})
    return found


def table(receipt: dict[str, Any]) -> str:
    """Return the receipt as text: rows, checks that failed or could not run, speeds, trainings."""
    lines = []
    for row in receipt["rows"]:
        lines.append(f"{row['name']:16} {row['outcome']:4} {row['seconds']:6.1f} s  {row['note'][:110]}")
        for check in row["checks"]:
            if not check["ok"]:
                detail = {name: value for name, value in check.items() if name not in ("check", "ok", "s", "top")}
                mark = "FAIL" if check["ok"] is False else "-"
                lines.append(f"  {check['check']}: {mark} {json.dumps(detail)[:240]}" if "us" not in check else "")
    for speed in receipt["speeds"]:
        gpu = f", {speed['kernels']:.0f} kernels busy {speed['busy_us']:.1f} us" if "kernels" in speed else ""
        lines.append(f"{speed['check']:34} {speed['us']:9.1f} us per step, host {speed['host_us']:.1f} us{gpu}")
    for run in receipt["trainings"]:
        accuracy = ", ".join(f"{name} {value:.2%}" for name, value in run["accuracy"].items())
        seconds = ", ".join(f"{name[:-8]} {run[name]} s" for name in BRIEF if name.endswith("_seconds") and name in run)
        lines.append(f"{run['name']:16} {run['world_size']} rank(s) {run['outcome']}, {seconds}, accuracy: {accuracy}")
    counts = receipt["counts"]
    end = (
        f"{counts['ok']} ok, {counts['failed']} failed, {counts['did_not_run']} did not run; {receipt['seconds']:.0f} s"
    )
    return "\n".join([*filter(None, lines), end])

"""Ends a rank that makes no progress, with one line that names the rank to blame and what it was doing.

Each rank maps its Clock's record to RUN/.ranks/rank-R. A thread checks that its own rank still changes phases. If the
rank stays in one phase for longer than the clock's limit, the thread reads all records, prints the verdict and the
Python stacks, and ends the process at once, because a main thread that is blocked in a collective cannot be
interrupted. A process that is stopped or frozen can neither print nor end by itself. The other ranks on its host do
both for it. If the ranks share no directory, a verdict rests on this rank's record alone, and its line says so.
"""

import contextlib
import faulthandler
import mmap
import os
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil

from train.errors import RunError, UserError
from train.rundir import replacing
from train.world.clock import SIZE, Clock, Record

TICK_SECONDS = 0.25
FROZEN_SECONDS = 5.0  # no heartbeat for this long means that the process is frozen
DYING_SECONDS = 2.0  # a dying process closes its connections first and leaves the process table later
# How to end a process that cannot end itself. SIGABRT prints the stacks; a stopped process would not handle it.
ENDED_BY = {"stopped": signal.SIGKILL, "frozen": signal.SIGABRT}


@dataclass(frozen=True)
class Verdict:
    """Which ranks are to blame for a hang, and why."""

    culprits: list[Record]  # none if all ranks wait
    line: str
    is_certain: bool = False  # whether a culprit has ended or failed, so that waiting for it is pointless


def process_state(pid: int) -> str:
    """Return the state of a process on this host in a word, such as `sleeping`; `ended` if there is none."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "ended"
    return {"zombie": "ended", "dead": "ended", "tracing-stop": "stopped"}.get(status, status)


def with_state(record: Record, now: float) -> Record:
    """Return a record with its process's state. On another host only the heartbeat shows: it is running or frozen."""
    state = process_state(record.pid) if record.host == socket.gethostname() else "running"
    is_frozen = now - record.heartbeat > FROZEN_SECONDS and state not in ("stopped", "ended")
    return replace(record, state="frozen" if is_frozen else state)


def find_culprits(records: list[Record]) -> list[Record]:
    """Return the records of the ranks to blame, by the first rule that finds any.

    1. The process ended. An error of its own excuses it: often it failed because another rank was gone.
    2. The rank has begun fewer collectives than others, and none has begun fewer.
    3. It does not wait for other ranks.
    """
    ended = [record for record in records if record.state == "ended" and record.phase != "failed"]
    lowest, highest = min(record.sequence for record in records), max(record.sequence for record in records)
    behind = [record for record in records if record.sequence == lowest < highest]
    busy = [r for r in records if r.phase not in ("reduce", "failed") or r.state in ("stopped", "frozen")]
    return ended or behind or busy


def describe(culprit: Record, now: float) -> str:
    """Return why a rank is to blame."""
    if culprit.phase == "failed":
        return "it failed with an error of its own"
    if culprit.state == "ended":
        return f"its process {culprit.pid} ended in {culprit.phase}"
    since = culprit.heartbeat if culprit.state in ("stopped", "frozen") else culprit.since
    return f"it is in {culprit.phase}, {culprit.state} for {now - since:.0f} s"


def judge(records: list[Record], world_size: int, now: float) -> Verdict:
    """Return who is to blame, from the records that could be read."""
    furthest = max(records, key=lambda record: record.sequence)
    missing = sorted(set(range(world_size)) - {record.rank for record in records})
    unknown = f"; no record of rank {', '.join(map(str, missing))}" if missing else ""
    where = f"collective {furthest.sequence} of step {furthest.step}" if world_size > 1 else f"step {furthest.step}"
    culprits = find_culprits(records)
    if not culprits:
        who = f"rank {furthest.rank} waits" if missing else "all ranks wait"
        return Verdict([], f"{who} in {where} for {now - furthest.since:.0f} s{unknown}")
    first, *others = culprits
    verb = "did not reach" if first.sequence < furthest.sequence else "did not finish"
    also = f" (nor did rank {', '.join(str(record.rank) for record in others)})" if others else ""
    line = f"rank {first.rank} on {first.host} {verb} {where}: {describe(first, now)}{also}{unknown}"
    return Verdict(culprits, line, any(r.state == "ended" or r.phase == "failed" for r in culprits))


class Watchdog:
    """The watchdog of one rank: a context manager around its training."""

    def __init__(self, clock: Clock, directory: Path, rank: int, world_size: int) -> None:
        self.clock, self.directory, self.rank, self.world_size = clock, directory, rank, world_size
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        with contextlib.suppress(OSError):  # without a record training continues; the other ranks then have none
            self._map_record()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching. If this rank fails because another one is gone, print which."""
        self.done.set()
        self.thread.join()
        if error is None or isinstance(error, (UserError, RunError)):  # all ranks leave together
            if self.rank == 0:
                shutil.rmtree(self.directory, ignore_errors=True)
        elif self.world_size > 1:
            if self.clock.phase == "reduce":
                print(f"error: {self.reach_verdict(DYING_SECONDS).line}", file=sys.stderr, flush=True)
            self.clock.enter("failed")

    def _map_record(self) -> None:
        """Map the clock's record to a new file. An earlier attempt may still write to the old one."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            (self.directory / "verdict").unlink(missing_ok=True)
        with replacing(self.directory / f"rank-{self.rank}") as temporary, open(temporary, "w+b") as file:
            file.truncate(SIZE)
            self.clock.attach(memoryview(mmap.mmap(file.fileno(), SIZE)))

    def records(self) -> list[Record]:
        """Return the records of all ranks that can be read, in the order of the ranks."""
        found = []
        for rank in range(self.world_size):
            with contextlib.suppress(OSError, ValueError, LookupError):
                is_own = rank == self.rank
                content = bytes(self.clock.record) if is_own else (self.directory / f"rank-{rank}").read_bytes()
                found.append(with_state(Record.unpack(rank, content), time.time()))
        return found

    def reach_verdict(self, patience_seconds: float = 0.0) -> Verdict:
        """Return the verdict; wait for one that is certain while patience lasts.

        Its line is that of the first rank with a verdict, so that all ranks that share the directory print the same.
        """
        deadline = time.monotonic() + patience_seconds
        verdict = judge(self.records(), self.world_size, time.time())
        while not verdict.is_certain and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS / 5)
            verdict = judge(self.records(), self.world_size, time.time())
        path, line = self.directory / "verdict", ""
        with contextlib.suppress(OSError), open(path, "x") as file:
            file.write(verdict.line)
        with contextlib.suppress(OSError):
            line = path.read_text()
        return replace(verdict, line=line or verdict.line)

    def _watch(self) -> None:
        """End this process if it stays in one phase for too long.

        This counts ticks instead of reading a clock, so that time in which all ranks were stopped does not count.
        """
        seconds, since = 0.0, self.clock.since
        while not self.done.wait(TICK_SECONDS):
            self.clock.heartbeat()
            seconds = seconds + TICK_SECONDS if self.clock.since == since else 0.0
            since = self.clock.since
            if seconds >= self.clock.limit:
                self._end()

    def _end(self) -> None:
        """Print the verdict and the stacks. End stopped and frozen processes on this host, and then this one."""
        verdict = self.reach_verdict()
        print(f"error: {verdict.line}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        for record in verdict.culprits:
            if record.rank != self.rank and record.host == socket.gethostname() and record.state in ENDED_BY:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(record.pid, ENDED_BY[record.state])
        self.clock.enter("failed")
        os._exit(1)

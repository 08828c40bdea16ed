"""Ends a rank that makes no progress, with one line that says which rank is to blame and what it was doing.

Each rank maps its Clock's record to RUN/.ranks/rank-R. A thread looks whether its own rank has entered a phase lately; if
not for longer than the clock's limit, it reads all records, prints the verdict and the Python stacks, and ends the process,
hard: a thread that is blocked in a collective cannot be interrupted. A stopped process cannot speak or end by itself: the
others on its host do both. Where the ranks share no directory a verdict knows this rank's record alone, and says so.
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
from pathlib import Path
from types import TracebackType

from train.errors import RunError, UserError
from train.world.clock import SIZE, Clock, Record

TICK_SECONDS = 0.25
SILENT_SECONDS = 5.0  # a watchdog that has not run for so long belongs to a process that cannot run
CORPSE_SECONDS = 2.0  # for a dying process to leave the process table, once its connections are closed
STATES = {
    "T": "stopped",
    "t": "stopped",
    "R": "running",
    "S": "asleep",
    "D": "waiting for a device",
    "Z": "ended",
    "X": "ended",
}


def process_state(pid: int) -> str:
    """What a process on this host does now, in a word; `ended` if there is none."""
    try:
        return STATES.get(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0], "running")
    except (OSError, IndexError):
        return "ended" if Path("/proc/self/stat").exists() else "running"


def state_of(record: Record, now: float) -> str:
    """What a rank's process does; on another host all that shows is whether its watchdog still runs."""
    state = process_state(record.pid) if record.host == socket.gethostname() else "running"
    return "silent" if state not in ("stopped", "ended") and now - record.beat > SILENT_SECONDS else state


def verdict(records: list[Record], states: dict[int, str], world_size: int, now: float) -> tuple[list[Record], str]:
    """Return (who is to blame, one line that says what for). `states` holds a word per rank."""
    furthest = max(records, key=lambda record: record.sequence)
    goal = f"{furthest.operation} {furthest.sequence} of step {furthest.step}"
    missing = sorted(set(range(world_size)) - {record.rank for record in records})
    unknown = f"; nothing is known of rank {', '.join(map(str, missing))}" if missing else ""
    ended = [record for record in records if states[record.rank] == "ended" and record.phase != "failed"]
    behind = [record for record in records if record.sequence < furthest.sequence]
    stuck = [
        record
        for record in records
        if states[record.rank] in ("stopped", "silent") or record.phase not in ("reduce", "failed")
    ]
    guilty = ended or [record for record in behind if record.sequence == min(r.sequence for r in behind)] or stuck
    if not guilty:
        waiting = f"all ranks wait in {goal} for {now - furthest.since:.0f} s"
        return [], (
            waiting if not missing else f"rank {furthest.rank} waits in {goal} for {now - furthest.since:.0f} s"
        ) + unknown
    first = guilty[0]
    state = states[first.rank]
    since = first.beat if state in ("stopped", "silent") else first.since
    doing = f"it is in {first.phase}, {state} for {now - since:.0f} s"
    if first.phase == "failed":
        doing = "it failed by an error of its own"
    elif state == "ended":
        doing = f"its process {first.pid} ended in {first.phase}"
    others = f" (nor did rank {', '.join(str(record.rank) for record in guilty[1:])})" if guilty[1:] else ""
    verb = "did not reach" if first.sequence < furthest.sequence else "did not finish"
    goal = f"step {first.step}" if world_size == 1 else goal
    return guilty, f"rank {first.rank} on {first.host} {verb} {goal}: {doing}{others}{unknown}"


class Watchdog:
    """The thread of one rank; a context manager around its training."""

    def __init__(self, clock: Clock, directory: Path, rank: int, world_size: int) -> None:
        self.clock, self.directory, self.rank, self.world_size = clock, directory, rank, world_size
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        with contextlib.suppress(
            OSError
        ):  # without a record the others know nothing of this rank, and training goes on
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                (self.directory / "verdict").unlink(missing_ok=True)
            path = self.directory / f"rank-{self.rank}"
            with open(path.with_suffix(".new"), "w+b") as file:
                file.truncate(SIZE)
                self.clock.attach(memoryview(mmap.mmap(file.fileno(), SIZE)))
            os.replace(path.with_suffix(".new"), path)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching. If this rank fails because another one has gone, say which."""
        self.done.set()
        self.thread.join()
        if error is None or isinstance(error, (UserError, RunError)):  # all ranks leave together
            if self.rank == 0:
                shutil.rmtree(self.directory, ignore_errors=True)
        elif self.world_size > 1:
            if self.clock.phase == "reduce":
                print(f"error: {self.verdict(CORPSE_SECONDS)[1]}", file=sys.stderr, flush=True)
            self.clock.enter("failed")

    def records(self) -> list[Record]:
        """The records of all ranks that can be read."""
        found = []
        for rank in range(self.world_size):
            with contextlib.suppress(OSError, ValueError, LookupError, ArithmeticError):
                found.append(Record.unpack(rank, (self.directory / f"rank-{rank}").read_bytes()))
        own = Record.unpack(self.rank, bytes(self.clock.record))
        return [record for record in found if record.rank != self.rank] + [own]

    def verdict(self, patience: float = 0.0) -> tuple[list[Record], str]:
        """Judge; all ranks of a host or a shared directory print the line that the first of them found."""
        deadline = time.monotonic() + patience
        while True:
            now, records = time.time(), sorted(self.records(), key=lambda record: record.rank)
            states = {record.rank: state_of(record, now) for record in records}
            guilty, line = verdict(records, states, self.world_size, now)
            if time.monotonic() >= deadline or any(states[r.rank] == "ended" or r.phase == "failed" for r in guilty):
                break
            time.sleep(TICK_SECONDS / 5)
        path = self.directory / "verdict"
        try:
            with open(path, "x") as file:
                file.write(line)
        except OSError:
            with contextlib.suppress(OSError):
                line = path.read_text() or line
        return guilty, line

    def _watch(self) -> None:
        """Count the ticks without a new mark: the time in which the whole group was stopped does not count."""
        still, since = 0.0, self.clock.since
        while not self.done.wait(TICK_SECONDS):
            self.clock.beat()
            still = still + TICK_SECONDS if self.clock.since == since else 0.0
            since = self.clock.since
            if still >= self.clock.limit:
                self._end()

    def _end(self) -> None:
        """Print the verdict and the stacks, end what cannot end itself, and leave."""
        guilty, line = self.verdict()
        print(f"error: {line}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        for record in guilty:
            if record.host == socket.gethostname() and record.rank != self.rank:
                state = state_of(record, time.time())
                if state in (
                    "stopped",
                    "silent",
                ):  # silent: something holds the interpreter, and SIGABRT prints its stacks
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(record.pid, signal.SIGKILL if state == "stopped" else signal.SIGABRT)
        self.clock.enter("failed")
        os._exit(1)

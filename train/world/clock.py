"""What this process is doing now, and how long it has done what: one mark at every change of phase.

Invariant: a process is in exactly one phase, so the phases' seconds add up to its life. A mark is two clock reads and one
write of 32 bytes, under 2 us; the watchdog maps those bytes to a file, where the other ranks read them even after this
process can no longer speak. Phases measure host time: on a GPU, work that was only launched counts where the host waits.
A meter (train/world/meter.py) measures a rank's own work on the device itself.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

# reduce: waiting for the other ranks, outside and at the end of the backward pass
PHASES = (
    "start",
    "data",
    "augment",
    "forward_backward",
    "reduce",
    "optimizer",
    "log",
    "evaluate",
    "save",
    "finish",
    "failed",
)
OWN_WORK = ("data", "augment", "forward_backward", "optimizer")
OPERATIONS = ("nothing", "all_reduce", "broadcast")
MARK = struct.Struct("=qqiid")  # step, sequence, phase, operation, since when
LIFE = struct.Struct("=di64s")  # the watchdog's last sign of life, process id, host
SIZE = MARK.size + LIFE.size
START_TIMEOUT_SECONDS = 600  # ranks may start minutes apart; after the warm-up train.timeout applies


@dataclass(frozen=True)
class Record:
    """Where a rank is, as it last wrote it; times in seconds since the epoch."""

    rank: int
    step: int  # the update that is being computed; the first one is 1
    sequence: int  # collectives that it has begun, in the order that is the same on all ranks
    phase: str
    operation: str  # the last of these collectives
    since: float  # when it entered its phase
    beat: float  # when its watchdog last ran: old if the process is stopped
    pid: int
    host: str

    @classmethod
    def unpack(cls, rank: int, content: bytes) -> "Record":
        """Read what a Clock wrote."""
        step, sequence, phase, operation, since = MARK.unpack_from(content)
        beat, pid, host = LIFE.unpack_from(content, MARK.size)
        name = host.rstrip(b"\0").decode()
        return cls(rank, step, sequence, PHASES[phase], OPERATIONS[operation], since, beat, pid, name)


class Meter(Protocol):
    """Measures own work on the device: the Clock tells it when a stretch begins and ends, and asks for the seconds."""

    def begin(self) -> None:
        """Mark the begin of a stretch of own work."""

    def end(self) -> None:
        """Mark its end."""

    def forget(self) -> None:
        """Forget all work so far."""

    def lap(self) -> float:
        """Return the seconds of own work in a step, without waiting for the device."""


class Clock:
    """The phase of this process, the seconds spent in each, and the collectives begun so far."""

    def __init__(self) -> None:
        self.phase, self.since = "start", time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.step, self.sequence, self.operation = 0, 0, "nothing"
        self.limit: float = START_TIMEOUT_SECONDS  # seconds without a mark that the watchdog allows
        self.record = memoryview(bytearray(SIZE))
        self._epoch = time.time() - time.perf_counter()
        self._lap = 0.0
        self.meter: Meter | None = None  # of a GPU among several

    def attach(self, record: memoryview) -> None:
        """Write the marks into `record` from now on."""
        self.record = record
        self.beat()
        self.enter(self.phase)

    def enter(self, phase: str) -> str:
        """Begin a phase; return the one that ends."""
        now, before = time.perf_counter(), self.phase
        self.seconds[before] += now - self.since
        self.phase, self.since = phase, now
        place, operation = PHASES.index(phase), OPERATIONS.index(self.operation)
        MARK.pack_into(self.record, 0, self.step, self.sequence, place, operation, self._epoch + now)
        if self.meter is not None and (before in OWN_WORK) != (phase in OWN_WORK):
            (self.meter.begin if phase in OWN_WORK else self.meter.end)()
        return before

    def announce(self, operation: str) -> None:
        """Count a collective that begins now, or that will be waited for at the end of this phase."""
        self.sequence += 1
        self.operation = operation
        self.enter(self.phase)

    @contextmanager
    def collective(self, operation: str) -> Iterator[None]:
        """Wait for the other ranks inside; after an error this stays the phase, which tells the watchdog whose fault it is."""
        before = self.phase
        self.announce(operation)
        self.enter("reduce")
        yield
        self.enter(before)

    def beat(self) -> None:
        """Leave a sign of life."""
        LIFE.pack_into(self.record, MARK.size, time.time(), os.getpid(), socket.gethostname().encode()[:64])

    def forget(self) -> None:
        """Begin a new lap: what was done before, such as a warm-up, is in none."""
        self.lap()
        if self.meter is not None:
            self.meter.forget()

    def lap(self) -> float:
        """Return the seconds of this rank's own work, without waiting, logging and saving, since the last call.

        On several GPUs these are seconds of the device, a few steps late, since asking must not wait: the mean of the steps
        that the device has finished since the last call, or the previous mean if it has finished none.
        """
        if self.meter is not None:
            return self.meter.lap()
        self.enter(self.phase)
        total = sum(self.seconds[phase] for phase in OWN_WORK)
        lap, self._lap = total - self._lap, total
        return lap

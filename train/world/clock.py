"""The phase that this process is in, and the seconds that it has spent in each.

Invariant: a process is in exactly one phase, so the phases' seconds add up to the process's time. A change of phase
costs two clock reads and one write of 32 bytes, under 2 us. The watchdog maps those bytes to a file, where the other
ranks can read them even when this process is frozen or dead. Phases measure the host's time: work that was only
launched on a GPU counts where the host waits for it. A meter (train/world/meter.py) measures a rank's own work on the
device itself.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.world.meter import DeviceMeter

PHASES = (
    "start",
    "data",
    "augment",
    "forward_backward",
    "reduce",  # waiting for the other ranks, outside and at the end of the backward pass
    "optimizer",
    "log",
    "evaluate",
    "save",
    "finish",
    "failed",
)
OWN_WORK = ("data", "augment", "forward_backward", "optimizer")
OPERATIONS = ("nothing", "all_reduce", "broadcast")
MARK = struct.Struct("=qqiid")  # step, sequence, phase, operation, time of entering the phase
HEARTBEAT = struct.Struct("=di64s")  # time of the watchdog's last heartbeat, process id, host
SIZE = MARK.size + HEARTBEAT.size
START_TIMEOUT_SECONDS = 600  # ranks may start minutes apart; after the warm-up train.timeout applies


@dataclass(frozen=True)
class Record:
    """Where a rank is, as its Clock last wrote it. Times are in seconds since the epoch."""

    rank: int
    step: int  # the update that is being computed; the first one is 1
    sequence: int  # number of collectives that the rank has begun; their order is the same on all ranks
    phase: str
    operation: str  # the last of these collectives
    since: float  # when the rank entered its phase
    heartbeat: float  # when its watchdog last ran: old if the process is frozen
    pid: int
    host: str

    @classmethod
    def unpack(cls, rank: int, content: bytes) -> "Record":
        """Read the bytes that a Clock wrote."""
        step, sequence, phase, operation, since = MARK.unpack_from(content)
        heartbeat, pid, host = HEARTBEAT.unpack_from(content, MARK.size)
        name = host.rstrip(b"\0").decode()
        return cls(rank, step, sequence, PHASES[phase], OPERATIONS[operation], since, heartbeat, pid, name)


class Clock:
    """The phase of this process, the seconds spent in each, and the number of collectives begun so far."""

    def __init__(self) -> None:
        self.phase, self.since = "start", time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.step, self.sequence, self.operation = 0, 0, "nothing"
        self.limit: float = START_TIMEOUT_SECONDS  # seconds in one phase that the watchdog allows
        self.record = memoryview(bytearray(SIZE))
        self.meter: DeviceMeter | None = None  # only for one of several GPUs
        self._epoch = time.time() - time.perf_counter()
        self._own_work_before = 0.0  # seconds of own work before the current lap

    def attach(self, record: memoryview) -> None:
        """Write into `record` from now on."""
        self.record = record
        self.heartbeat()
        self.enter(self.phase)

    def enter(self, phase: str) -> str:
        """Begin a phase; return the one that ends."""
        now, before = time.perf_counter(), self.phase
        self.seconds[before] += now - self.since
        self.phase, self.since = phase, now
        numbers = PHASES.index(phase), OPERATIONS.index(self.operation)
        MARK.pack_into(self.record, 0, self.step, self.sequence, *numbers, self._epoch + now)
        if self.meter is not None:
            if phase in OWN_WORK and before not in OWN_WORK:
                self.meter.begin()
            if phase not in OWN_WORK and before in OWN_WORK:
                self.meter.end()
        return before

    def announce(self, operation: str) -> None:
        """Count a collective that begins now, or that this phase ends by waiting for."""
        self.sequence += 1
        self.operation = operation
        self.enter(self.phase)

    @contextmanager
    def collective(self, operation: str) -> Iterator[None]:
        """Mark the enclosed code as waiting for other ranks.

        On error the phase is kept, so that the watchdog can tell waiting ranks from the failed one.
        """
        before = self.phase
        self.announce(operation)
        self.enter("reduce")
        yield
        self.enter(before)

    def heartbeat(self) -> None:
        """Write that this process is alive now."""
        HEARTBEAT.pack_into(self.record, MARK.size, time.time(), os.getpid(), socket.gethostname().encode()[:64])

    def forget(self) -> None:
        """Drop the work so far, such as that of a warm-up: the next `take_lap` does not count it."""
        self.take_lap()
        if self.meter is not None:
            self.meter.forget()

    def take_lap(self) -> float:
        """Return the seconds of this rank's own work, without waiting, logging and saving, since the last call.

        With a meter these are the device's seconds, and a few steps late, because this must not wait for the device.
        """
        if self.meter is not None:
            return self.meter.take_lap()
        self.enter(self.phase)
        own_work = sum(self.seconds[phase] for phase in OWN_WORK)
        lap, self._own_work_before = own_work - self._own_work_before, own_work
        return lap

"""The phase that this process is in, the seconds that it has spent in each, and how long its GPU has worked.

Invariant: a process is in exactly one phase, so the phases' seconds add up to the process's time. A change of phase
costs two clock reads and one write of 28 bytes, under 2 us. The watchdog maps those bytes to a file, where the other
ranks can read them even when this process is frozen or dead. Phases measure the host's time: work that was only
launched on a GPU counts where the host waits for it. A DeviceMeter measures a rank's own work on the device itself.
"""

import os
import socket
import statistics
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

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
MARK = struct.Struct("=qqid")  # step, sequence, phase, time of entering the phase
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
    since: float  # when the rank entered its phase
    heartbeat: float  # when its watchdog last ran: old if the process is frozen
    pid: int
    host: str
    state: str = "running"  # of its process, as the watchdog that reads the record sees it

    @classmethod
    def unpack(cls, rank: int, content: bytes) -> "Record":
        """Read the bytes that a Clock wrote."""
        step, sequence, phase, since = MARK.unpack_from(content)
        heartbeat, pid, host = HEARTBEAT.unpack_from(content, MARK.size)
        return cls(rank, step, sequence, PHASES[phase], since, heartbeat, pid, host.rstrip(b"\0").decode())


def record_event() -> Any:
    """Record a CUDA event with a time stamp in the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class DeviceMeter:
    """The seconds that a GPU works between `begin` and `end`, added up per step.

    The host only launches kernels, so the host's clock does not show a throttled GPU. Nothing here waits for the
    device: the seconds of a step become known a few steps later.
    """

    def __init__(self, record: Callable[[], Any] = record_event) -> None:
        self.record = record
        self.started: Any = None  # the event at which the current stretch of own work began
        self.stretches: list[tuple[Any, Any]] = []  # (start, end) of the current step
        self.steps: deque[list[tuple[Any, Any]]] = deque()  # earlier steps, which the device may not have finished
        self.latest = 0.0

    def begin(self) -> None:
        """Mark the start of own work in the current stream."""
        self.started = self.record()

    def end(self) -> None:
        """Mark the end of own work in the current stream."""
        self.stretches.append((self.started, self.record()))

    def forget(self) -> None:
        """Drop all work so far, such as that of a warm-up."""
        self.stretches, self.latest = [], 0.0
        self.steps.clear()

    def take_lap(self) -> float:
        """End a step; return the mean seconds of the steps that the device has finished since the last call.

        If it has finished none, return the previous mean, which is 0 at first.
        """
        self.steps.append(self.stretches)
        self.stretches = []
        seconds = []
        while self.steps and all(event.query() for stretch in self.steps[0] for event in stretch):
            seconds.append(sum(start.elapsed_time(end) for start, end in self.steps.popleft()) / 1000)
        if seconds:
            self.latest = statistics.fmean(seconds)
        return self.latest


class Clock:
    """The phase of this process, the seconds spent in each, and the number of collectives begun so far."""

    def __init__(self, meter: DeviceMeter | None = None) -> None:
        self.phase, self.since = "start", time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.step = self.sequence = 0
        self.limit: float = START_TIMEOUT_SECONDS  # seconds in one phase that the watchdog allows
        self.record = memoryview(bytearray(SIZE))
        self.meter = meter  # only for one of several GPUs
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
        MARK.pack_into(self.record, 0, self.step, self.sequence, PHASES.index(phase), self._epoch + now)
        if self.meter is not None and (phase in OWN_WORK) != (before in OWN_WORK):
            mark = self.meter.begin if phase in OWN_WORK else self.meter.end
            mark()
        return before

    def announce(self) -> None:
        """Count a collective that this phase ends by waiting for."""
        self.sequence += 1
        self.enter(self.phase)

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Count a collective, and mark the enclosed code as waiting for other ranks.

        On error the phase is kept, so that the watchdog can tell waiting ranks from the failed one.
        """
        self.sequence += 1
        before = self.enter("reduce")
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

"""Signals that ask for a stop: a handler sets a flag, which the ranks share in the step's reduction. All stop together.

Before training there is nothing to save, so a signal ends the process at once. That must also work while the main
thread waits in C++ for other ranks, where it runs no handler: a thread reads the signals' numbers from a pipe.

Deliberately not here: saving. A handler that saves could interrupt a collective and then deadlock in another one.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from train.errors import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2)


class _State:
    """What this process does about signals, and what it has received."""

    def __init__(self) -> None:
        self.replaced: dict[signal.Signals, Any] = {}  # the handlers before ours
        self.replaced_fd = -1  # the file descriptor that was told of signals before
        self.received: list[str] = []
        self.say: Callable[[str], None] = lambda text: None
        self.is_deferred = False  # whether a stop waits for the end of a step
        self.deadline = math.inf  # on time.monotonic()


_state = _State()


def wanted() -> list[signal.Signals]:
    """Return the signals to handle. SIGHUP is not one of them if it is ignored, as under nohup.

    torchrun handles SIGHUP even then, and kills its ranks half a minute later: they must save.
    """
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and "TORCHELASTIC_RUN_ID" not in os.environ
    return [number for number in SIGNALS if number != signal.SIGHUP or not is_ignored]


def install() -> None:
    """Handle signals from now on. Python allows that in the main thread only: do nothing in another one.

    Repeated calls change nothing. A launcher starts its ranks with these signals blocked, so that none is lost before.
    They arrive here.
    """
    if _state.replaced or threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    _state.replaced_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _state.replaced = {number: signal.signal(number, _handle) for number in wanted()}
    # after the handlers: this thread unblocks the signals, and without a handler they would kill the process
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def left_to_thread() -> Iterator[None]:
    """Let the thread that reads the signals receive them too, while this thread waits in C++ inside the block.

    torch prints a stack trace if a signal interrupts it while it connects. Threads started here block these signals.
    """
    if _state.replaced:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        if _state.replaced:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def restoring() -> Iterator[None]:
    """Give back, after the block, the handlers that it has installed, and forget what it has received."""
    global _state
    is_ours = not _state.replaced
    try:
        yield
    finally:
        if is_ours:
            for number, handler in _state.replaced.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
            if _state.replaced:
                os.close(signal.set_wakeup_fd(_state.replaced_fd))  # ends the thread
            _state = _State()


def announce(say: Callable[[str], None]) -> None:
    """Let `say` print what a signal does. It is called in another thread."""
    _state.say = say


def defer() -> None:
    """From now on let a signal wait for the end of a step: there is something to save.

    Until then, a program that calls `main` itself has its own handlers.
    """
    _state.is_deferred = True
    install()


def leave_after(minutes: float) -> None:
    """Ask this process to stop after some minutes; 0: never."""
    _state.deadline = time.monotonic() + 60 * minutes if minutes else math.inf


def requested() -> str | None:
    """Return the name of the first signal that this rank received, `run.time_limit` if its time is up, or None."""
    if _state.received:
        return _state.received[0]
    return "run.time_limit" if time.monotonic() >= _state.deadline else None


def _handle(number: int, frame: FrameType | None) -> None:
    _state.received.append(signal.Signals(number).name)


def _watch(reader: int) -> None:
    """Act on each signal at once, in a thread of its own, until the pipe is closed."""
    is_announced = False
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a launcher starts its ranks with these blocked
    while number := os.read(reader, 1):
        if number[0] not in _state.replaced:
            continue
        name = signal.Signals(number[0]).name
        if not _state.is_deferred:
            _state.say(f"{name} received: stopped before the first step, nothing to save")
            os._exit(PREEMPTED)
        if not is_announced:
            _state.say(f"{name} received: saving after this step, then stopping")
        is_announced = True
    os.close(reader)

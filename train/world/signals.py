"""Signals that ask for a stop: a handler sets a flag, which the ranks share in the step's reduction. All stop together.

Deliberately not here: saving. A handler that saves could interrupt a collective and then deadlock in another one.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

_received: list[int] = []


def _handle(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def install() -> None:
    """Handle SIGTERM, SIGINT and SIGUSR2 from now on. Repeated signals and calls change nothing.

    A launcher starts its ranks with these signals blocked, so that none is lost before. They arrive here.
    """
    for number in SIGNALS:
        signal.signal(number, _handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def leave_after(minutes: float) -> None:
    """Let an alarm ask this process to stop after some minutes; 0: never."""
    signal.signal(signal.SIGALRM, _handle)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


def requested() -> str | None:
    """Return the name of the first signal that this rank received, or None. SIGALRM means that its time is up."""
    return signal.Signals(_received[0]).name if _received else None

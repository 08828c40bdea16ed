"""Signal -> flag. The handler only sets it; all ranks agree on it in the step's reduction, save and leave (exit code 75).

Deliberately not here: saving. A handler that saves would deadlock in a collective that it interrupted.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

_received: list[int] = []


def _handle(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def install() -> None:
    """Listen to SIGTERM, SIGINT and SIGUSR2 from now on. Repeated signals and calls change nothing.

    A launcher starts its ranks with these signals blocked, so that none is lost before; here they arrive.
    """
    for number in SIGNALS:
        signal.signal(number, _handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def leave_after(minutes: float) -> None:
    """Let an alarm ask this process to leave once the time is up; 0: never."""
    signal.signal(signal.SIGALRM, _handle)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


def requested() -> str | None:
    """The name of the first signal that this rank received (SIGALRM: its time is up), or None."""
    return signal.Signals(_received[0]).name if _received else None

"""Signal -> flag. The handler only sets it; all ranks agree on it in the step's reduction, save and leave (exit code 75).

Deliberately not here: saving. A handler that saves would deadlock in a collective that it interrupted.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
EXIT_CODE = 75  # EX_TEMPFAIL: preempted with a checkpoint saved; start again to go on

_received: list[int] = []


def _handle(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def install() -> None:
    """Listen to SIGTERM, SIGINT and SIGUSR2 from now on. Repeated signals change nothing."""
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, _handle)


def requested() -> str | None:
    """The name of the first signal that this rank received, or None."""
    return signal.Signals(_received[0]).name if _received else None

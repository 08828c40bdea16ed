"""Exit codes, and the two kinds of errors that a person reads as one line.

Anything else raised is a bug and keeps its traceback.
"""

import contextlib
import difflib
from collections.abc import Iterator, Sequence

FINISHED, CRASHED, BAD_INPUT = 0, 1, 2
PREEMPTED = 75  # sysexits.h: EX_TEMPFAIL. A checkpoint was saved, or training had not begun; start it again.
INTERRUPTED, READER_LEFT = 130, 141  # of commands that only print, as a shell reports SIGINT and SIGPIPE


class UserError(ValueError):
    """Bad config, data or checkpoint. The message says what was got, what was expected and what to do. Exit code 2."""

    def __str__(self) -> str:
        """Return the message in one line, even if the name of a file in it has several."""
        return " ".join(super().__str__().splitlines())


class RunError(RuntimeError):
    """A failure during the run, although config and data are good. Exit code 1."""


def one_line(error: BaseException, max_length: int = 200) -> str:
    """Return an error's message as one line, or the name of its type if it has none."""
    return (" ".join(str(error).split()) or type(error).__name__)[:max_length]


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    """Turn any error of the block into a UserError: the message, then the error's own, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what libraries raise for a damaged file has no common class
        raise UserError(f"{message}: {one_line(error, 120).rstrip('.')}.") from None


def did_you_mean(wrong: str, names: Sequence[str], otherwise: str) -> str:
    """Return `Did you mean NAME?` for the nearest of the valid names, or `otherwise`."""
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(wrong.lower(), lower, n=1, cutoff=0.5)
    return f"Did you mean {lower[near[0]]}?" if near else otherwise

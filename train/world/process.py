"""This process as a process of the operating system: its output, how it ends, its memory, and who may write its files.

Invariant: nothing that is printed decides what becomes of a run. Its record is metrics.jsonl.
"""

import contextlib
import ctypes
import errno
import io
import os
import re
import select
import signal
import stat
import sys
from pathlib import Path
from typing import Any, NoReturn

from train.errors import READER_LEFT, RunError

# mallopt(3). M_MMAP_MAX 0: no tensor gets pages of its own. M_TRIM_THRESHOLD -1: none are given back. M_TOP_PAD: bytes
# that are requested at once.
MALLOC_OPTIONS = {-4: 0, -1: -1, -2: 64 << 20}


def keep_others_from_writing() -> None:
    """Deny other users the right to change files that this process creates, whatever the caller's umask allows."""
    os.umask(os.umask(0o002) | stat.S_IWOTH)


class _Output(io.FileIO):
    """A descriptor to print to. What cannot be written, because a disk is full or a reader has left, is dropped."""

    is_required = False  # whether lost output ends the process

    def write(self, content: Any) -> int:
        """Write bytes. If output is required, raises SystemExit or RunError the first time that it is lost."""
        try:
            while (written := super().write(content)) is None:  # a full pipe that does not block
                select.select([], [self], [])
            return written
        except OSError as error:
            if self.is_required:
                self.is_required = False
                if error.errno == errno.EPIPE:
                    raise SystemExit(READER_LEFT) from None
                raise RunError(f"The output cannot be written: {error.strerror}.") from error
            return len(content)


def protect_output(*, is_required: bool = False) -> None:
    """Let print and rich survive closed streams, full disks, readers that have left, and characters without a code.

    Call it first of all. With `is_required`, for a command that only prints, lost standard output ends the process:
    silently if the reader has left, with an error if a disk is full.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed; the next file to be opened would get this number, and our lines
            os.open(os.devnull, os.O_RDWR)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        raw = _Output(descriptor, "w", closefd=False)
        raw.is_required = is_required and name == "stdout"
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=before.encoding if before else "utf-8",
            errors="backslashreplace",
            line_buffering=raw.isatty() or name == "stderr",
            write_through=bool(before and before.write_through),
        )
        setattr(sys, name, stream)


def leave(code: int) -> NoReturn:
    """End this process at once, without the interpreter's clean-up. Call it when everything is closed and written.

    During the clean-up a thread of gloo still releases tensors. With it, about one of thirty runs on two ranks ended in
    SIGABRT after correct work, although the process group had been destroyed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):
            stream.flush()
    os._exit(code)


def _ask_to_be_killed() -> None:
    """Ask Linux to kill this process when its parent dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def die_with_parent(parent: int) -> None:
    """In a child: arrange to be killed when the process `parent` dies, so that no rank is orphaned. Linux only."""
    if sys.platform == "linux":
        _ask_to_be_killed()
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def die_with_launcher() -> None:
    """Arrange to be killed when this rank's launcher dies. Linux only. A killed torchrun leaves its workers running."""
    if sys.platform != "linux" or not {"TORCHELASTIC_RUN_ID", "LOCKSTEP_RESTART"} & os.environ.keys():
        return
    parent, program = os.getppid(), b""
    with contextlib.suppress(OSError):  # it may be ending
        program = Path(f"/proc/{parent}/cmdline").read_bytes().partition(b"\0")[0]
    is_launcher = re.search(rb"python|torchrun|accelerate", program) is not None
    if is_launcher:  # or else the variables are left from an earlier one
        _ask_to_be_killed()
    if os.getppid() != parent or (parent == 1 and not is_launcher):
        os.kill(os.getpid(), signal.SIGKILL)  # it died before we asked, and init has adopted this process


def tune_malloc() -> None:
    """Let glibc keep freed memory for the next step instead of giving it back to the kernel, which zeroes it each time.

    A step on a CPU allocates the same large tensors again and again. Page faults would cost a third of its time
    (docs/log.md).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for parameter, value in MALLOC_OPTIONS.items() if hasattr(libc, "mallopt") else ():  # musl has none
            libc.mallopt(parameter, value)

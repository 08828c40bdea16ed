"""This process as a process of the operating system: how it ends, its memory, and who may write to its files."""

import contextlib
import ctypes
import os
import re
import signal
import stat
import sys
from pathlib import Path
from typing import NoReturn

# mallopt(3). M_MMAP_MAX 0: no tensor gets pages of its own. M_TRIM_THRESHOLD -1: none are given back. M_TOP_PAD: bytes
# that are requested at once.
MALLOC_OPTIONS = {-4: 0, -1: -1, -2: 64 << 20}


def keep_others_from_writing() -> None:
    """Deny other users the right to change files that this process creates, whatever the caller's umask allows."""
    os.umask(os.umask(0o002) | stat.S_IWOTH)


def leave(code: int) -> NoReturn:
    """End this process at once, without the interpreter's clean-up. Call it when everything is closed and written.

    During the clean-up a thread of gloo still releases tensors. With it, about one of thirty runs on two ranks ended in
    SIGABRT after correct work, although the process group had been destroyed.
    """
    with contextlib.suppress(OSError):  # the reader of a pipe may be gone
        sys.stdout.flush()
        sys.stderr.flush()
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
    _ask_to_be_killed()
    if os.getppid() == 1 and not re.search(rb"python|torchrun|accelerate", Path("/proc/1/cmdline").read_bytes()):
        os.kill(os.getpid(), signal.SIGKILL)  # it died before we asked: init has adopted this process


def tune_malloc() -> None:
    """Let glibc keep freed memory for the next step instead of giving it back to the kernel, which zeroes it each time.

    A step on a CPU allocates the same large tensors again and again. Page faults would cost a third of its time
    (docs/log.md).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for parameter, value in MALLOC_OPTIONS.items() if hasattr(libc, "mallopt") else ():  # musl has none
            libc.mallopt(parameter, value)

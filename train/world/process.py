"""What concerns this process as a process of the operating system: how it ends, and what others may do with its files."""

import contextlib
import ctypes
import os
import re
import signal
import stat
import sys
from pathlib import Path
from typing import NoReturn


def keep_others_from_writing() -> None:
    """Deny other users the right to change files that this process creates, whatever the caller's umask allows."""
    os.umask(os.umask(0o002) | stat.S_IWOTH)


def leave(code: int) -> NoReturn:
    """End this process at once, without the interpreter's clean-up. Everything is closed and written by now.

    During the clean-up a thread of gloo still releases tensors: about one of thirty runs on two ranks ended in SIGABRT after
    correct work, although the process group had been destroyed.
    """
    with contextlib.suppress(OSError):  # nobody reads the output any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _ask_to_be_killed() -> None:
    """Ask Linux to kill this process when its parent dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def die_with_parent(parent: int) -> None:
    """In a child: be killed when the process `parent` dies, so that no rank is orphaned. Linux only."""
    if sys.platform == "linux":
        _ask_to_be_killed()
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def die_with_launcher() -> None:
    """Be killed when the launcher that started this rank dies. Linux only: torchrun, when killed, leaves its workers running."""
    if sys.platform != "linux" or not {"TORCHELASTIC_RUN_ID", "LOCKSTEP_RESTART"} & os.environ.keys():
        return
    _ask_to_be_killed()
    if os.getppid() == 1 and not re.search(rb"python|torchrun|accelerate", Path("/proc/1/cmdline").read_bytes()):
        os.kill(os.getpid(), signal.SIGKILL)  # it died before we asked, and init has adopted this process

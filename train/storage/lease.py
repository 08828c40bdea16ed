"""The lease on a run directory: one process writes at a time, and a process that was replaced can never write again.

Lock: the writer holds flock on `RUN/.lock`, which is released when the process ends, however it ends. A second run in
the directory is refused. A later attempt of the same Slurm job may take over: a broken network can cut off an earlier
attempt without ending it.

Fence: each attempt creates a staging directory, `checkpoints/.writing-TOKEN/`, at its start and never again.
It prepares everything that it writes there and renames it into place. A takeover moves the old staging directory away.
From then on its writes, renames and deletions find no directory and fail. Nothing is checked before a write, so there
is no moment between a check and a write in which an old attempt could still get through. metrics.jsonl is replaced in
the same way at the start of each attempt, so an old attempt appends to a file that no longer has a name.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from train.errors import UserError
from train.rundir import RunDir, write_atomically
from train.world.launcher import read_count

PREFIX = ".writing-"
# of file systems without flock
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EPERM)
MAX_TRIES = 100  # to lock a file that others keep removing


class Fenced(RuntimeError):
    """Another attempt has taken over this run. This process can no longer write to it."""


def flock(descriptor: int, flags: int, path: Path, risk: str) -> None:
    """Lock an open file. On a file system without locks, print a warning with the risk instead."""
    try:
        fcntl.flock(descriptor, flags)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: {path} cannot be locked: {error.strerror}. {risk}", file=sys.stderr)


def identity() -> dict[str, Any]:
    """Return the content of the lock file, which identifies this process to others."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": read_count("SLURM_RESTART_COUNT"),  # not set in the first attempt
        "srun": read_count("LOCKSTEP_RESTART"),  # slurm/train.sbatch may run several in one attempt
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def is_later_attempt(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Return whether `new` is a later attempt of `old`'s Slurm job, which means that Slurm has given up the old one."""
    new_attempt, old_attempt = ((holder.get("restart", 0), holder.get("srun", 0)) for holder in (new, old))
    return new["job"] is not None and new["job"] == old.get("job") and new_attempt > old_attempt


class Lease:
    """The right to write into a run directory, held by rank 0. On other ranks it does nothing. A context manager."""

    def __init__(self, run_dir: Path, *, is_main: bool) -> None:
        """Acquire the lease. Raises UserError if a running process holds it or the directory cannot be written."""
        self.run_dir = RunDir(run_dir)
        self.lock, self.checkpoints = self.run_dir.lock, self.run_dir.checkpoints
        self.staging = self.checkpoints / f"{PREFIX}{secrets.token_hex(4)}"
        self.descriptor: int | None = None
        if not is_main:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.descriptor = self._lock(identity())
            self.staging.mkdir()
            self._fence()
        except OSError as error:
            raise UserError(
                f"{run_dir} cannot be written: {error.strerror}. Use another run.dir or run.name."
            ) from error

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lease and remove its files."""
        if self.descriptor is None:
            return
        shutil.rmtree(self.staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # some file systems do not remove an open file
            if self._is_lock_file(self.descriptor):
                self.lock.unlink()
        os.close(self.descriptor)
        with contextlib.suppress(OSError):  # they are empty if the run was refused before it wrote anything
            self.checkpoints.rmdir()
            self.run_dir.path.rmdir()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Yield the staging directory. Raises Fenced if another attempt has moved it away."""
        try:
            yield self.staging
        except FileNotFoundError:
            if self.staging.exists():
                raise
            raise Fenced(
                f"fenced: {self._owner()} has taken over {self.run_dir.path}. This process can no longer write to it."
            ) from None

    def write(self, path: Path, content: bytes) -> None:
        """Write a file of the run atomically. Raises Fenced like `writing`."""
        with self.writing() as staging:
            write_atomically(path, content, staging)

    def _lock(self, own: dict[str, Any]) -> int:
        """Lock the `.lock` file, write our identity into it and return its descriptor."""
        for _ in range(MAX_TRIES):
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                risk = "A second run in this directory would not be noticed."
                flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, self.lock, risk)
            except BlockingIOError:
                os.close(descriptor)
                if not is_later_attempt(own, self._read()):
                    refusal = f"{self.run_dir.path} is being trained by {self._owner()}."
                    raise UserError(f"{refusal} Wait, stop it, or use another run.name.") from None
                self.lock.unlink(missing_ok=True)  # the old attempt then holds the lock of a file without a name
                continue
            if self._is_lock_file(descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(own).encode())
                return descriptor
            os.close(descriptor)  # the file was removed between our open and our lock: try again
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(self.lock))

    def _is_lock_file(self, descriptor: int) -> bool:
        """Return whether `.lock` is still the file that we opened."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), self.lock.stat())
        return False

    def _read(self) -> dict[str, Any]:
        """Return the lock file's content, or {} if it cannot be read."""
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self.lock.read_text())
            return content if isinstance(content, dict) else {}
        return {}

    def _owner(self) -> str:
        """Describe the process that holds the lease."""
        owner = self._read()
        if not owner:
            return "another process"
        job = f", Slurm job {owner['job']}, attempt {owner['restart'] + 1}" if owner.get("job") else ""
        return f"process {owner['pid']} on {owner['host']}{job}, since {owner['since']}"

    def _fence(self) -> None:
        """Move the staging directories of earlier attempts away, then delete them.

        A deletion in place would race, file by file, with an attempt that still writes.
        """
        for number, other in enumerate(self.checkpoints.glob(f"{PREFIX}*")):
            if other != self.staging:
                fenced = self.staging / f"fenced-{number}"
                other.rename(fenced)
                shutil.rmtree(fenced, ignore_errors=True)

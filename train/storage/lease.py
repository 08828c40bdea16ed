"""Who may write into a run directory: one process at a time, and an old one never after a new one has started.

Lock: `RUN/.lock` is held by flock, so it dies with its owner; a second run in the directory is refused. The next incarnation of
the same Slurm job may take over from one that a broken network has silenced but not ended.
Fence: an incarnation prepares all it writes in its own `checkpoints/.writing-TOKEN/`, made once, at the start, and renames it
into place. Taking over moves that directory away: every later write, rename or prune of the old incarnation finds no
directory and fails. Nothing is checked before a write, so no pause between a check and a write can let an old one through.
metrics.jsonl is replaced so at the start: an old incarnation appends to a file without a name.
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

PREFIX = ".writing-"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without flock


class Fenced(RuntimeError):
    """Another incarnation of this run has taken over: this one has written its last."""


def identity() -> dict[str, Any]:
    """Who asks for the lease, as the lock file tells others."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),  # unset in the first life
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def is_next_life(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether `new` is a later incarnation of the Slurm job that `old` belongs to: Slurm has given the old one up."""
    return new["job"] is not None and new["job"] == old.get("job") and new["restart"] > old.get("restart", 0)


class Lease:
    """The right to write into a run directory. Rank 0 takes it, the other ranks hold a silent one. A context manager."""

    def __init__(self, run_dir: Path, *, is_main: bool) -> None:
        """Take the lease; raise UserError if a living process has it or the directory cannot be written."""
        self.run_dir, self.lock, self.checkpoints = run_dir, run_dir / ".lock", run_dir / "checkpoints"
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
        """Give the lease back; leave no trace of it."""
        if self.descriptor is None:
            return
        shutil.rmtree(self.staging, ignore_errors=True)
        if self._is_named(self.descriptor):
            self.lock.unlink()
        os.close(self.descriptor)
        with contextlib.suppress(OSError):  # of a run that was refused before it wrote anything
            self.checkpoints.rmdir()
            self.run_dir.rmdir()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """The directory in which to prepare what is renamed into place; raise Fenced if another incarnation took it away."""
        try:
            yield self.staging
        except FileNotFoundError:
            if self.staging.exists():
                raise
            raise Fenced(
                f"fenced: {self._owner()} took over {self.lock.parent}; this process writes nothing more"
            ) from None

    def write(self, path: Path, content: bytes) -> None:
        """Write a file of the run atomically."""
        with self.writing() as staging:
            (staging / path.name).write_bytes(content)
            os.replace(staging / path.name, path)

    def _lock(self, own: dict[str, Any]) -> int:
        """Return the descriptor of the locked `.lock` file, with our name in it."""
        while True:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                if not is_next_life(own, self._read()):
                    raise UserError(
                        f"{self.lock.parent} is being trained by {self._owner()}. Wait, stop that, or use another run.name."
                    ) from None
                self.lock.unlink(missing_ok=True)  # the silent owner keeps a lock on a file without a name
                continue
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(
                    f"{self.lock} cannot be locked ({error.strerror}): a second run here would go unnoticed",
                    file=sys.stderr,
                )
            if self._is_named(descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(own).encode())
                return descriptor
            os.close(descriptor)  # its owner left, or was replaced, between our open and our lock

    def _is_named(self, descriptor: int) -> bool:
        """Whether `.lock` is still the file that we opened."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), self.lock.stat())
        return False

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.lock.read_text())
            return found if isinstance(found, dict) else {}
        return {}

    def _owner(self) -> str:
        owner = self._read()
        if not owner:
            return "another process"
        job = f", Slurm job {owner['job']}, life {owner['restart'] + 1}" if owner.get("job") else ""
        return f"process {owner['pid']} on {owner['host']}{job}, since {owner['since']}"

    def _fence(self) -> None:
        """Take away what earlier incarnations were preparing. By a rename first: a deletion file by file would race."""
        for number, other in enumerate(self.checkpoints.glob(f"{PREFIX}*")):
            if other != self.staging:
                fenced = self.staging / f"fenced-{number}"
                other.rename(fenced)
                shutil.rmtree(fenced, ignore_errors=True)

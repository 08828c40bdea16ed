"""Kill the writing of a checkpoint at each of its system calls, by strace's fault injection.

A child of the fork server encodes a state, waits until it is traced, and then writes and prunes. strace delivers
SIGKILL at the n-th call of a name. The older or the newer checkpoint must always be whole, and the next save must
succeed.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from conftest import small_state

from ranks.processes import _context
from train.storage import checkpoint
from train.storage.lease import Lease

OLDER, NEWER = 10, 20
IGNORED = re.compile(r"mmap|munmap|mremap|mprotect|madvise|brk|futex|rt_sig|restart_syscall|getrandom|exit|sched|clock")


def _write(directory: str) -> None:
    files = checkpoint.encode(small_state(NEWER))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    (Path(directory) / "ready").touch()
    signal.sigwait({signal.SIGUSR2})
    _save(Path(directory), NEWER, files)
    os._exit(0)


def _save(run: Path, step: int, files: checkpoint.Files) -> None:
    with Lease(run, is_main=True) as lease, lease.writing() as staging:
        checkpoint.write(lease.checkpoints, step, files, staging)
        checkpoint.prune(lease.checkpoints, 1, {step}, staging)


def _traced(directory: Path, *options: str) -> int | None:
    """Write a newer checkpoint next to an older one under strace; return the exit code."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    _save(directory, OLDER, checkpoint.encode(small_state(OLDER)))
    process = _context.Process(target=_write, args=(str(directory),))
    process.start()
    deadline = time.monotonic() + 60
    while not (directory / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    (directory / "ready").unlink()
    assert process.pid
    command = ["strace", "-qq", "-p", str(process.pid), "-o", str(directory.with_suffix(".strace")), *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as strace:
        while "TracerPid:\t0" in Path(f"/proc/{process.pid}/status").read_text():
            assert strace.poll() is None, "strace cannot attach"
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGUSR2)
        process.join(60)
    return process.exitcode


def points(directory: Path) -> list[tuple[str, int]]:
    """Return the system calls of an undisturbed save, as (name, how many of that name so far)."""
    assert _traced(directory) == 0
    count: Counter[str] = Counter()
    found = []
    for line in directory.with_suffix(".strace").read_text().splitlines():
        if (match := re.match(r"(\w+)\(", line)) and not IGNORED.match(match[1]):
            count[match[1]] += 1
            found.append((match[1], count[match[1]]))
    return found


def crash(directory: Path, name: str, number: int) -> str | None:
    """Kill a save at a system call; return what is then wrong with the disk, or None."""
    code = _traced(directory, "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}")
    if code != -signal.SIGKILL:
        return f"exit code {code}"
    problems: list[str] = []
    checkpoints = directory / "checkpoints"
    named = checkpoint.directories(checkpoints)
    whole = [checkpoint.step_of(path) for path in named if checkpoint.is_whole(path)]
    found = checkpoint.latest(checkpoints, problems.append)
    if problems or found is None or not set(whole) & {OLDER, NEWER} or len(whole) != len(named):
        return f"whole {whole}, {problems}"
    _save(directory, NEWER, checkpoint.encode(small_state(NEWER)))
    left = sorted(str(path.relative_to(directory)) for path in directory.glob("*/*")) + list(
        map(str, directory.glob(".*"))
    )
    newest = f"checkpoints/step-{NEWER:08d}"
    return None if left == [newest] and checkpoint.is_whole(directory / newest) else f"left {left}"


def campaign(options: object, place: Path) -> dict[str, Any]:
    """Kill a save at each of its system calls."""
    calls = points(place / "run")
    found = {f"{name} {number}": crash(place / "run", name, number) for name, number in calls}
    return {"points": len(calls), "problems": {point: problem for point, problem in found.items() if problem}}


def table(result: dict[str, Any]) -> str:
    """Return the outcome in one sentence."""
    problems = result["problems"]
    killed = f"killed at {result['points']} system calls of a save"
    return f"{killed}: {len(problems)} left no whole checkpoint {problems or ''}"

"""Real ranks for tests: processes with their own process group, from a fork server that has torch imported already.

A start takes a fraction of a second instead of seconds. Each rank runs `train.__main__.main` as `python -m train` does.
"""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from train.world import signals

_context = multiprocessing.get_context("forkserver")
# torch._dynamo: the first optimizer step imports it, for more than a second
_context.set_forkserver_preload(["torch", "torch._dynamo", "accelerate", "train.loop"])


def _gpus() -> dict[str, str | None]:
    """Return the test's GPUs as variables for a rank, because the fork server keeps the environment of its start."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}


def _rank_main(env: dict[str, str | None], argv: list[str], log: str, program: str = "train.__main__") -> None:
    for name, value in env.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    os.setpgrp()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if mutant := env.get("MUTANT"):
        module, _, name = mutant.rpartition(".")
        getattr(importlib.import_module(f"ranks.{module or 'mutants'}"), name)()
    if program == "train.__main__":
        signals.install()
    code = importlib.import_module(program).main(argv)
    sys.stdout.flush()
    sys.exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """`world_size` processes that train with the same arguments; logs in `directory`/rank-R.log."""

    def __init__(
        self, world_size: int, argv: list[str], directory: Path, module: str = "train.__main__", **env: str
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.logs = [directory / f"rank-{rank}.log" for rank in range(world_size)]
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WANDB_MODE": "disabled",
            **_gpus(),
            **env,
        }
        shared |= {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], "MNIST_ROOT": os.environ.get("MNIST_ROOT", "")}
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            place = {name: str(value) for name, value in own.items()} if world_size > 1 else {}
            self.processes.append(_context.Process(target=_rank_main, args=(shared | place, argv, str(log), module)))
        for process in self.processes:
            process.start()

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def wait(self, seconds: float = 200) -> list[int]:
        """Return all exit codes. Ranks that still run after `seconds` are killed, and the test fails."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.signal(signal.SIGKILL)
        assert not hung, f"ranks {hung} did not end within {seconds} s\n{self.output()}"
        return [process.exitcode or 0 for process in self.processes]

    def output(self) -> str:
        """Return what all ranks printed."""
        return "".join(log.read_text() for log in self.logs if log.exists())


class Forked:
    """A training as `launch.run.Ranks` starts it, on ranks from the fork server, with a mutant in them."""

    def __init__(self, mutant: str, world_size: int, arguments: list[str], output: IO[str]) -> None:
        self.output = output
        self.ranks = Ranks(world_size, arguments, Path(f"{output.name}-{world_size}"), MUTANT=mutant)
        self.processes = [
            SimpleNamespace(kill=process.kill, poll=lambda process=process: process.exitcode)
            for process in self.ranks.processes
        ]

    def wait(self, seconds: float) -> int:
        codes = self.ranks.wait()
        self.output.write(self.ranks.output())
        return next((code for code in codes if code), 0)


def rows(run: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Return the whole rows of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # being written
            continue
    return [row for row in found if event in (None, row["event"])]


def wait_for_step(run: Path, step: int, seconds: float = 200) -> None:
    """Return once a run has logged `step`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in rows(run, "train")):
            return
        time.sleep(0.005)
    raise AssertionError(f"{run} did not reach step {step} in {seconds} s")


def train(world_size: int, run: Path, *flags: str, codes: set[int] | None = None, **env: str) -> dict[str, Any]:
    """Train to the end on `world_size` ranks; return summary.json."""
    ranks = Ranks(world_size, arguments(run, *flags), run.parent / f"{run.name}-logs", **env)
    found = ranks.wait()
    assert set(found) == (codes or {0}), f"exit codes {found}\n{ranks.output()}"
    return json.loads((run / "summary.json").read_text())


def launch(log: Path, *argv: str, **env: str) -> tuple[int, str]:
    """Run `python -m launch` with arguments, with torch imported already; return (exit code, what it printed)."""
    log.unlink(missing_ok=True)
    env |= {"XDG_CACHE_HOME": env.get("XDG_CACHE_HOME", os.environ["XDG_CACHE_HOME"])}
    process = _context.Process(
        target=_rank_main, args=(_gpus() | env, " ".join(argv).split(), str(log), "launch.__main__")
    )
    process.start()
    process.join(90)
    assert process.exitcode is not None, f"{argv} hangs\n{log.read_text()}"
    return process.exitcode, log.read_text()


def arguments(run: Path, *flags: str) -> list[str]:
    """Return the command line of a small run on digits and the CPU; later flags win."""
    small = "--data.name digits --model.name tiny --train.global_batch_size 64 --train.num_threads 1 --train.device cpu"
    quiet = "--log.progress false --log.report false"
    return [
        *small.split(),
        *quiet.split(),
        "--run.dir",
        str(run.parent),
        "--run.name",
        run.name,
        *" ".join(flags).split(),
    ]

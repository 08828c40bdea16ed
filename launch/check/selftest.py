"""`python -m launch selftest`: prove the promise on this machine: (config, step) determines everything.

Trains a small exact run with everything switched on, undisturbed on one process and beside it on two of which one is
killed; resumes that one on another world size; and checks what both wrote, law by law (laws.py). Needs no data set, no
internet and half a minute; leaves nothing behind. Exit codes: 0 all laws hold, 1 one does not, 2 bad usage.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from launch.check.laws import BATCH, LR, SAVE_STEPS, STEPS_PER_EPOCH, Evidence, Trace, judge
from launch.run import Ranks, count_gpus, die_with_parent
from train.cli import Parser
from train.errors import UserError

COMMON = "--data.name digits --log.every_steps 1 --log.progress false --log.report false --wandb.mode disabled --train.num_threads 1"
EVERYTHING = (
    f"--model.name tiny_bn --model.dropout 0.2 --augment.shift 2 --augment.rotate 10 --augment.erase 0.3 --optim.lr {LR} "
    f"--optim.ema 0.9 --optim.clip_norm 1 --train.exact true --train.micro_batches 5 --train.global_batch_size {BATCH} "
    f"--checkpoint.every_steps {SAVE_STEPS} --eval.batch_size 100"
)
# The weights stay as they are: what the loss of a step depends on is what the run is named after, and nothing else.
FROZEN = "--model.name tiny --optim.lr 1e-30 --eval.every_steps 1000 --checkpoint.every_steps 1000"
ONE_EXAMPLE = f"{FROZEN} --data.validation 1437 --train.max_steps 12"
RUNS = {
    "alone": EVERYTHING,
    "order": f"{FROZEN} --train.epochs 2 --train.micro_batches 5 --train.global_batch_size {BATCH}",
    "dropout": f"{ONE_EXAMPLE} --model.dropout 0.5",
    "augment": f"{ONE_EXAMPLE} --augment.shift 2 --augment.rotate 10",
}
# The kill is due in the second half, in the middle of an epoch and between two checkpoints. A GPU makes three such steps in
# 10 ms, in which we may miss them: it gets many more chances.
EPOCHS = {"cpu": 3, "cuda": 31}
POLL_SECONDS = 0.005


class Training(Protocol):
    """The processes of a training."""

    def is_running(self) -> bool:
        """Whether all of them run."""

    def kill(self, rank: int) -> None:
        """End one of them by SIGKILL."""

    def wait(self) -> int:
        """Return 0, or the exit code of a failure, once none runs."""


# (module, world size, its arguments, log file) -> started
Start = Callable[[str, int, list[str], Path], Training]


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Let what this process and its new children print go to a file."""
    kept = os.dup(1), os.dup(2)
    with open(log, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


class Processes:
    """A training as users start it: by the launcher's Ranks, or as one process of another module."""

    def __init__(self, module: str, world_size: int, arguments: list[str], log: Path) -> None:
        # Nothing of the caller's is read, nothing is left behind: torch makes a directory in TMPDIR, data.py one in the cache.
        os.environ |= {"XDG_CACHE_HOME": str(log.parent / "cache"), "TMPDIR": str(log.parent)}
        self.log = log
        self.ranks: Ranks | None = None
        with _output_to(log):
            if module == "train":
                self.ranks = Ranks(world_size, arguments, restart=0)
                self.processes = self.ranks.processes
            else:
                command = (sys.executable, "-m", module, *arguments)
                self.processes = [subprocess.Popen(command, preexec_fn=functools.partial(die_with_parent, os.getpid()))]

    def is_running(self) -> bool:
        """Whether all processes run."""
        return all(process.poll() is None for process in self.processes)

    def kill(self, rank: int) -> None:
        """End one process by SIGKILL."""
        self.processes[rank].kill()

    def wait(self) -> int:
        """Return 0, or the exit code of a failure, once no process runs."""
        with _output_to(self.log):
            return self.ranks.wait() if self.ranks else self.processes[0].wait()


class Failed(Exception):
    """A training did not do its part; the message says which and how."""


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _last_step(run: Path) -> int:
    """The last logged step of a run that may be writing now."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((row["step"] for row in map(json.loads, lines) if row["event"] == "train"), default=0)


def _kill_between_saves(training: Training, run: Path, log: Path, after_step: int) -> int:
    """Kill rank 0 after a step, some steps after a checkpoint; return the last step that it logged."""
    step = 0
    while step < after_step or not SAVE_STEPS // 4 <= step % SAVE_STEPS <= SAVE_STEPS // 2:
        if not training.is_running():
            training.wait()
            raise Failed(
                f"the training that was to be killed ended before, at step {_last_step(run)}: {_last_line(log)}"
            )
        time.sleep(POLL_SECONDS)
        step = _last_step(run)
    training.kill(0)
    training.wait()
    return _last_step(run)


def train(directory: Path, device: str, worlds: tuple[int, int], start: Start) -> Evidence:
    """Do all trainings in `directory`; raise Failed where one does not finish."""

    def arguments(name: str, flags: str) -> list[str]:
        place = f"--train.device {device} --run.name {name}"
        return [*f"{COMMON} --train.epochs {EPOCHS[device]} {flags} {place}".split(), "--run.dir", str(directory)]

    logs = {name: directory / f"{name}.log" for name in ("undisturbed", "killed", "resumed")}
    trainings = json.dumps([arguments(name, flags) for name, flags in RUNS.items()])
    checkpoints = directory / "alone" / "checkpoints"
    undisturbed = start("launch.check.crashpoints", 1, [str(checkpoints), trainings], logs["undisturbed"])
    moved = arguments("moved", EVERYTHING)
    try:
        killed = start("train", worlds[0], moved, logs["killed"])
        after_step = EPOCHS[device] * STEPS_PER_EPOCH // 2
        killed_at = _kill_between_saves(killed, directory / "moved", logs["killed"], after_step)
        resumed = start("train", worlds[1], moved, logs["resumed"])
        ended = {"resumed": resumed.wait(), "undisturbed": undisturbed.wait()}
    except Failed:
        undisturbed.wait()
        raise
    for name, code in ended.items():
        if code:
            raise Failed(f"the {name} training ended with exit code {code}: {_last_line(logs[name])}")
    traces = {name: Trace(directory / name) for name in (*RUNS, "moved")}
    return Evidence(**traces, killed_at=killed_at, worlds=worlds, epochs=EPOCHS[device])


def world_sizes(device: str) -> tuple[int, int]:
    """Return the world sizes before and after the kill; raise UserError if there is no such device."""
    if device == "cpu":
        return 2, 3
    gpus = count_gpus()
    if not gpus:
        raise UserError("--device is cuda and this machine shows no GPU. Use --device cpu.")
    return min(2, gpus), 3 if gpus > 2 else 1


def main(argv: list[str], start: Start = Processes) -> int:
    """Train, judge and print a line per law; return the exit code."""
    parser = Parser(prog="python -m launch selftest", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default cpu)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="train in this new directory and keep it")
    options = parser.parse_args(argv)
    worlds = world_sizes(options.device)
    if options.keep and options.keep.exists():
        raise UserError(f"--keep {options.keep} exists already. Give a new directory.")
    began = time.monotonic()
    steps = EPOCHS[options.device] * STEPS_PER_EPOCH
    print(
        f"{steps} exact steps on 1 process, and on {worlds[0]}, killed, then {worlds[1]} ({options.device})", flush=True
    )
    with contextlib.ExitStack() as stack:
        if options.keep:
            options.keep.mkdir(parents=True)
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockstep-selftest-")))
        try:
            verdicts = judge(train(directory.resolve(), options.device, worlds, start))
        except Failed as failure:
            verdicts = {"training": (False, str(failure))}
    for name, (holds, figures) in verdicts.items():
        print(f"{'OK  ' if holds else 'FAIL'}  {name:20}  {figures}")
    broken = sum(not holds for holds, _ in verdicts.values())
    result = f"{broken} of {len(verdicts)} laws broken" if broken else f"all {len(verdicts)} laws hold"
    print(f"{result}, {time.monotonic() - began:.0f} s")
    return 1 if broken else 0

"""`python -m launch selftest`: show on this machine that kills and the number of processes change nothing.

Trains a small exact run on one process. Trains it again on two, kills one of them, damages the newest checkpoint and
resumes on three. Then judges what both runs wrote, law by law, by arithmetic of its own. Needs no data set, no internet
and half a minute. Leaves nothing behind. Exit codes: 0 all laws hold, 1 a law is broken, 2 bad usage.
"""

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from launch.run import Ranks, count_gpus
from train.cli import Parser
from train.errors import CRASHED, FINISHED, RunError, UserError
from train.rundir import RunDir, Tail

NUM_TRAIN, NUM_TEST = 1438, 359  # of digits
BATCH, SAVE_STEPS = 95, 7  # the last batch of an epoch has 13 examples
STEPS_PER_EPOCH = math.ceil(NUM_TRAIN / BATCH)
QUIET = "--log.every_steps 1 --log.progress false --log.report false --wandb.mode disabled"
EVERYTHING = (
    f"{QUIET} --data.name digits --train.num_threads 1 --train.global_batch_size {BATCH} --train.num_micro_batches 5 "
    "--train.exact true --model.name tiny_bn --model.dropout 0.2 --augment.shift 2 --augment.rotate 10 "
    "--augment.erase 0.3 --optim.lr 0.05 --optim.ema 0.9 --optim.clip_norm 1 --eval.batch_size 100 "
    f"--checkpoint.every_steps {SAVE_STEPS} --checkpoint.keep 3"
)
# A GPU makes three such steps in 10 ms, so that we may miss the steps to kill at. It gets many more of them.
EPOCHS = {"cpu": 3, "cuda": 31}
POLL_SECONDS = 0.005

Verdict = tuple[bool, str]  # whether a law holds, and the figures


def start(world_size: int, arguments: list[str], output: IO[str]) -> Ranks:
    """Start the processes of a training, which print to a file."""
    return Ranks(world_size, arguments, restart=0, output=output)


def train(run: RunDir, world_size: int, flags: str, kill_after: int = 0) -> None:
    """Train a run to its end, or kill one process after a step. Raise RunError if it ends in another way."""
    place = ["--run.dir", str(run.path.parent), "--run.name", run.name]
    with open(run.path.with_suffix(".log"), "a+") as log:
        ranks = start(world_size, [*flags.split(), *place], log)
        is_killed = kill_after > 0 and kill_between_saves(ranks, run, kill_after)
        code = ranks.wait()
        log.seek(0)
        last = ([line for line in log.read().splitlines() if line.strip()] or ["no output"])[-1]
    if not is_killed and (code or kill_after):
        raise RunError(f"the training on {world_size} process(es) ended with exit code {code}: {last}")


def kill_between_saves(ranks: Ranks, run: RunDir, after_step: int) -> bool:
    """Kill rank 0 after a step, soon after a checkpoint. Return False if the training ends before."""
    tail, step = Tail(run.metrics), 0
    while step < after_step or not 1 <= step % SAVE_STEPS <= SAVE_STEPS // 2:
        if any(process.poll() is not None for process in ranks.processes):
            return False
        time.sleep(POLL_SECONDS)
        step = max([step, *(row["step"] for row in tail.rows() if row["event"] == "train")])
    ranks.processes[0].kill()
    return True


def damage_newest(run: RunDir) -> int:
    """Flip a bit of the newest checkpoint; return the step of the one before."""
    before, newest = sorted(run.checkpoints.glob("step-*"))[-2:]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    return int(before.name.removeprefix("step-"))


class Trace:
    """What a finished run wrote."""

    def __init__(self, run: RunDir) -> None:
        summary = run.read_summary()
        assert summary
        self.rows, self.summary = run.read_rows(), summary

    def column(self, event: str, *fields: str) -> list[tuple[Any, ...]]:
        """Return these fields of all rows of an event."""
        return [tuple(row[field] for field in fields) for row in self.rows if row["event"] == event]


@dataclass(frozen=True)
class Evidence:
    """The undisturbed run, the one that moved to another world size, and what happened to it."""

    alone: Trace
    moved: Trace
    worlds: tuple[int, int]  # world sizes before and after the kill
    killed_at: int  # the last step that was logged before the kill
    whole_at: int  # the step of the newest checkpoint that was not damaged
    steps: int

    def compare(self, what: str, read: Callable[[Trace], list[Any]]) -> Verdict:
        """Compare what was read from both runs, item by item."""
        alone, moved = read(self.alone), read(self.moved)
        for one, other in zip_longest(alone, moved):
            if one != other:
                return False, f"first difference: {one} != {other}"[:200]
        return len(alone) > 0, f"{len(alone)} {what}: the same bits"


def _same_weights(found: Evidence) -> Verdict:
    return found.compare(
        "fingerprints of weights and averaged weights",
        lambda trace: [trace.summary.weights_sha256, trace.summary.ema_weights_sha256],
    )


def _same_losses(found: Evidence) -> Verdict:
    fields = ("step", "loss", "grad_norm", "lr")
    return found.compare("losses, gradient norms and learning rates", lambda trace: trace.column("train", *fields))


def _each_step_once(found: Evidence) -> Verdict:
    for trace in (found.alone, found.moved):
        steps = [step for (step,) in trace.column("train", "step")]
        if steps != list(range(1, found.steps + 1)):
            return False, f"{len(steps)} rows, {len(set(steps))} different steps, expected {found.steps} of both"
    return True, f"{found.steps} rows for {found.steps} steps"


def _each_example_once(found: Evidence) -> Verdict:
    for trace in (found.alone, found.moved):
        ledger = trace.summary.ledger or {"step": 0, "count": 0}
        if (ledger["step"], ledger["count"]) != (found.steps, NUM_TRAIN):
            return False, f"the last epoch: {ledger}, expected {NUM_TRAIN} examples"
    return found.compare(f"coverage checksum of {NUM_TRAIN} examples", lambda trace: [trace.summary.ledger])


def _evaluation(found: Evidence) -> Verdict:
    rows = found.moved.column("eval", "num_examples", "correct", "accuracy")
    for num_examples, correct, accuracy in rows:
        if num_examples != NUM_TEST or accuracy != correct / NUM_TEST:
            return False, f"{correct} of {num_examples} examples, accuracy {accuracy}: the test split has {NUM_TEST}"
    if len(rows) != 2 * found.steps // STEPS_PER_EPOCH:  # the weights and their average, after each epoch
        return False, f"{len(rows)} evaluations in {found.steps} steps"
    fields = ("step", "ema", "correct", "loss")
    return found.compare(
        f"results of {NUM_TEST} examples, with each prediction",
        lambda trace: [*trace.column("eval", *fields), trace.summary.results],
    )


def _resume(found: Evidence) -> Verdict:
    starts = found.moved.column("start", "world_size", "step")
    holds = starts == [(found.worlds[0], 0), (found.worlds[1], found.whole_at)]
    figures = f"killed after step {found.killed_at}, newest checkpoint damaged, resumed from {starts[-1][1]}"
    return holds and found.killed_at - found.whole_at <= 2 * SAVE_STEPS, figures


LAWS: dict[str, Callable[[Evidence], Verdict]] = {
    "same weights": _same_weights,
    "same losses": _same_losses,
    "each step once": _each_step_once,
    "each example once": _each_example_once,
    "evaluation": _evaluation,
    "resume": _resume,
}


def collect(directory: Path, device: str, worlds: tuple[int, int]) -> Evidence:
    """Do all trainings in a directory. Raise RunError where one does not finish."""
    os.environ |= {"XDG_CACHE_HOME": str(directory / "cache"), "TMPDIR": str(directory)}
    steps = EPOCHS[device] * STEPS_PER_EPOCH
    flags = f"{EVERYTHING} --train.device {device} --train.epochs {EPOCHS[device]}"
    alone, moved = RunDir(directory / "alone"), RunDir(directory / "moved")
    train(alone, 1, flags)
    train(moved, worlds[0], flags, kill_after=steps // 2)
    killed_at = max(row["step"] for row in moved.read_rows() if row["event"] == "train")
    whole_at = damage_newest(moved)
    train(moved, worlds[1], flags)
    return Evidence(Trace(alone), Trace(moved), worlds, killed_at, whole_at, steps)


def world_sizes(device: str) -> tuple[int, int]:
    """Return the world sizes before and after the kill. Raise UserError if there is no such device."""
    if device == "cpu":
        return 2, 3
    gpus = count_gpus()
    if not gpus:
        raise UserError("--device is cuda and this machine shows no GPU. Use --device cpu.")
    return min(2, gpus), 3 if gpus > 2 else 1


def main(argv: list[str]) -> int:
    """Train, judge and print a line per law; return the exit code."""
    parser = Parser(prog="python -m launch selftest", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default cpu)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="train in this new directory and keep it")
    options = parser.parse_args(argv)
    worlds, began = world_sizes(options.device), time.monotonic()
    if options.keep and options.keep.exists():
        raise UserError(f"--keep {options.keep} exists already. Give a new directory.")
    print(f"training on 1 process, then on {worlds[0]}, killed, then on {worlds[1]} ({options.device})", flush=True)
    with contextlib.ExitStack() as stack:
        if options.keep:
            options.keep.mkdir(parents=True)
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockstep-selftest-")))
        try:
            evidence = collect(directory.resolve(), options.device, worlds)
            verdicts = {name: law(evidence) for name, law in LAWS.items()}
        except RunError as error:
            verdicts = {"training": (False, str(error))}
    for name, (holds, figures) in verdicts.items():
        print(f"{'OK  ' if holds else 'FAIL'}  {name:20}  {figures}")
    broken = sum(not holds for holds, _ in verdicts.values())
    result = f"{broken} of {len(verdicts)} laws broken" if broken else f"all {len(verdicts)} laws hold"
    print(f"{result}, {time.monotonic() - began:.0f} s")
    return CRASHED if broken else FINISHED

"""`python -m launch selftest` and `launch demo`: show on this machine that kills and world sizes change nothing.

The self-test trains a small exact run on one process. It trains it again on two, kills one of them, damages the newest
checkpoint and resumes on three. Then it judges what both runs wrote, law by law, by arithmetic of its own. It needs no
data set, no internet and half a minute. The demo shows the same bits on up to four processes, in under two minutes.
Neither leaves anything behind. Exit codes: 0 all laws hold, 1 a law is broken, 2 bad usage.
"""

import math
import os
import tempfile
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

from launch.run import Ranks, count_gpus
from train.cli import Parser
from train.errors import CRASHED, FINISHED, RunError, UserError
from train.rundir import RunDir, Tail

NUM_TRAIN, NUM_TEST = 1438, 359  # of digits
BATCH, SAVE_STEPS = 95, 7  # the last batch of an epoch has 13 examples
STEPS_PER_EPOCH = math.ceil(NUM_TRAIN / BATCH)
QUIET = ["--log.every_steps", "1", "--log.progress", "false", "--log.report", "false", "--wandb.mode", "disabled"]
EVERYTHING = (
    f"--data.name digits --train.num_threads 1 --train.global_batch_size {BATCH} --train.num_micro_batches 5 "
    "--train.exact true --model.name tiny_bn --model.dropout 0.2 --augment.shift 2 --augment.rotate 10 "
    "--augment.erase 0.3 --optim.lr 0.05 --optim.ema 0.9 --optim.clip_norm 1 --eval.batch_size 100 "
    f"--checkpoint.every_steps {SAVE_STEPS} --checkpoint.keep 3"
)
DEMO = (
    "--config configs/exact.yaml --data.fallback true --model.dropout 0.2 --augment.shift 2 "
    f"--checkpoint.every_steps {SAVE_STEPS}"
)
# A GPU makes three such steps in 10 ms, so that we may miss the steps to kill at. It gets many more of them.
EPOCHS = {"cpu": 3, "cuda": 31}
DEMO_STEPS = {"cpu": 40, "cuda": 1000}
DEMO_WORLD = 4
POLL_SECONDS = 0.005

Law = tuple[str, str, list[Any], list[Any]]  # its name, what is compared, what must be found, what the run wrote


def train(run: RunDir, world_size: int, flags: list[str], kill_after: int = 0, seconds: float = math.inf) -> None:
    """Train a run to its end, or kill one process after a step. Raise RunError or TimeoutError if it ends otherwise."""
    arguments = [*flags, *QUIET, "--run.dir", str(run.path.parent), "--run.name", run.name]
    with open(run.path.with_suffix(".log"), "a+") as log:
        ranks = Ranks(world_size, arguments, output=log)
        is_killed = kill_after > 0 and kill_between_saves(ranks, run, kill_after)
        code = ranks.wait(seconds)
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
    """Flip a bit of the newest checkpoint; return the step of the one before. Raise RunError if both are old."""
    before, newest = sorted(run.checkpoints.glob("step-*"))[-2:]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    killed_at, whole_at = run.read_rows()[-1]["step"], int(before.name.removeprefix("step-"))
    if killed_at - whole_at > 2 * SAVE_STEPS:
        raise RunError(f"a process was killed after step {killed_at}, but there is no newer checkpoint than {newest}")
    return whole_at


class Trace:
    """What a finished run wrote."""

    def __init__(self, run: RunDir) -> None:
        summary = run.read_summary()
        assert summary
        self.rows, self.summary = run.read_rows(), summary
        self.fingerprints = [summary.weights_sha256, summary.ema_weights_sha256, summary.ledger, summary.results]

    def column(self, event: str, *fields: str) -> list[tuple[Any, ...]]:
        """Return these fields of all rows of an event."""
        return [tuple(row[field] for field in fields) for row in self.rows if row["event"] == event]

    def losses(self) -> list[tuple[Any, ...]]:
        """Return the numbers of each step and each evaluation."""
        return self.column("train", "step", "loss", "grad_norm", "lr") + self.column("eval", "step", "ema", "loss")


def collect_laws(directory: Path, device: str, worlds: tuple[int, int]) -> list[Law]:
    """Do all trainings in a directory, and return the laws to judge. Raise RunError if a training does not finish."""
    os.environ |= {"XDG_CACHE_HOME": str(directory / "cache"), "TMPDIR": str(directory)}
    steps = EPOCHS[device] * STEPS_PER_EPOCH
    flags = [*EVERYTHING.split(), "--train.device", device, "--train.epochs", str(EPOCHS[device])]
    undisturbed, hit = RunDir(directory / "undisturbed"), RunDir(directory / "hit")
    train(undisturbed, 1, flags)
    train(hit, worlds[0], flags, kill_after=steps // 2)
    whole_at = damage_newest(hit)
    train(hit, worlds[1], flags)
    alone, moved = Trace(undisturbed), Trace(hit)
    ledger = moved.summary.ledger or {}
    ends = range(STEPS_PER_EPOCH, steps + 1, STEPS_PER_EPOCH)
    evaluations = moved.column("eval", "step", "ema", "num_examples", "accuracy", "correct")
    return [
        ("same weights", "fingerprints of weights, examples and predictions", alone.fingerprints, moved.fingerprints),
        ("same losses", "rows of losses, gradient norms and learning rates", alone.losses(), moved.losses()),
        ("each step once", "rows", [(step + 1,) for step in range(steps)], moved.column("train", "step")),
        (
            "each example once",
            "figures of the last epoch",
            [steps, NUM_TRAIN],
            [ledger.get("step"), ledger.get("count")],
        ),
        (
            "evaluation",
            f"evaluations of all {NUM_TEST} examples, with their accuracy",
            [(step, is_averaged, NUM_TEST, True) for step in ends for is_averaged in (False, True)],
            [(*row, accuracy == correct / NUM_TEST) for *row, accuracy, correct in evaluations],
        ),
        (
            "resume",
            "starts, the second from the newest checkpoint that was not damaged",
            [(worlds[0], 0), (worlds[1], whole_at)],
            moved.column("start", "world_size", "step"),
        ),
    ]


def judge(what: str, expected: list[Any], found: list[Any]) -> tuple[bool, str]:
    """Return whether a law holds, and the figures."""
    for one, other in zip_longest(expected, found):
        if one != other:
            return False, f"expected {one}, found {other}"[:200]
    return True, f"{len(found)} {what}"


def world_sizes(device: str) -> tuple[int, int]:
    """Return the world sizes before and after the kill. Raise UserError if there is no such device."""
    num_devices = count_gpus() if device == "cuda" else 3
    if not num_devices:
        raise UserError("--device is cuda and this machine shows no GPU. Use --device cpu.")
    return min(2, num_devices), 3 if num_devices > 2 else 1


def main(argv: list[str]) -> int:
    """Train, judge and print a line per law; return the exit code."""
    description = "Train on 1 process, and on several that are killed; judge, law by law, what both runs wrote."
    parser = Parser(prog="python -m launch selftest", description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default cpu)")
    device = parser.parse_args(argv).device
    worlds, began = world_sizes(device), time.monotonic()
    print(f"training on 1 process, then on {worlds[0]}, killed, then on {worlds[1]} ({device})", flush=True)
    with tempfile.TemporaryDirectory(prefix="lockstep-selftest-") as directory:
        try:
            laws = collect_laws(Path(directory).resolve(), device, worlds)
            verdicts = {name: judge(what, expected, found) for name, what, expected, found in laws}
        except RunError as error:
            verdicts = {"training": (False, str(error))}
    for name, (holds, figures) in verdicts.items():
        print(f"{'OK  ' if holds else 'FAIL'}  {name:20}  {figures}")
    broken = sum(not holds for holds, _ in verdicts.values())
    result = f"{broken} of {len(verdicts)} laws broken" if broken else f"all {len(verdicts)} laws hold"
    print(f"{result}, {time.monotonic() - began:.0f} s")
    return CRASHED if broken else FINISHED


def demo(argv: list[str]) -> int:
    """Train a run on 1, 2, 3 and 4 GPUs, or CPU processes; return 0 if the final weights are the same bits."""
    Parser(prog="python -m launch demo", description="Show the same bits on 1, 2, 3 and 4 processes.").parse_args(argv)
    began, hashes = time.monotonic(), set()
    device = "cuda" if count_gpus() >= DEMO_WORLD else "cpu"
    flags = [*DEMO.split(), "--train.device", device, "--train.max_steps", str(DEMO_STEPS[device])]
    plan = [
        ("one", 1, 0, "1 process"),
        ("two", 2, 15, "2 processes, one of them killed ..."),
        ("two", 3, 0, "        ... and resumed on 3"),
        ("four", DEMO_WORLD, 0, f"{DEMO_WORLD} processes"),
    ]
    with tempfile.TemporaryDirectory() as directory:
        for name, world_size, kill_after, text in plan:
            print(f"{text:45}", end="", flush=True)
            run = RunDir(Path(directory) / name)
            train(run, world_size, flags, kill_after)
            summary = run.read_summary()
            if summary and summary.final:
                hashes.add(summary.weights_sha256)
                print(f"{summary.data['name']} {summary.final.accuracy:.2%}  weights {summary.weights_sha256[:32]}")
            else:
                print()
    print(f"{'the same bits' if len(hashes) == 1 else 'DIFFERENT BITS'}, {time.monotonic() - began:.0f} s")
    return FINISHED if len(hashes) == 1 else CRASHED

"""What `launch bench` measures by starting trainings: exact mode, scaling, start-up, time to accuracy.

Trainings run as users start them, by `launch run`'s Ranks. Speed is taken between two rows of metrics.jsonl, so that neither
start nor end of a run counts; where they should count, the clock of this process is read.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.bench.harness import Row
from launch.run import Ranks, count_gpus

STEPS, WARM_UP_STEPS, GLOBAL_BATCH_SIZE = 100, 20, 512
LONG = 500  # steps, where what is measured comes in bursts
RECIPE = (
    "--data.name random --model.name cnn --train.precision bf16 --train.num_threads 1 --log.every_steps 10 "
    f"--train.max_steps {STEPS} --eval.every_steps {STEPS} --checkpoint.every_steps {STEPS} --data.random_examples 10240"
)
QUIET = "--log.progress false --log.report false --wandb.mode disabled"


def run(directory: Path, name: str, world_size: int, *flags: str) -> dict[str, Any]:
    """Train to the end, later flags win; return {"summary", "rows", "seconds" of the whole command}."""
    arguments = [*QUIET.split(), *" ".join(flags).split(), "--run.dir", str(directory), "--run.name", name]
    began = time.perf_counter()
    if Ranks(world_size, arguments, 0, quiet=True).wait():
        raise RuntimeError(f"The run {name} failed. See what `python -m train {' '.join(arguments)}` says.")
    seconds = time.perf_counter() - began
    rows = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    return {"summary": json.loads((directory / name / "summary.json").read_text()), "rows": rows, "seconds": seconds}


def images_per_second(directory: Path, name: str, world_size: int, batch: int, flags: str) -> float:
    """Train on noise and return the speed after the warm-up."""
    found = run(directory, name, world_size, f"{RECIPE} --train.global_batch_size {batch}", flags)
    seconds = {row["step"]: row["train_seconds"] for row in found["rows"] if row["event"] == "train"}
    last = max(seconds)
    return batch * (last - WARM_UP_STEPS) / (seconds[last] - seconds[WARM_UP_STEPS])


def in_turns(cells: dict[str, tuple[int, int, str]], repeats: int) -> dict[str, list[float]]:
    """Measure the images/s of cells {name: (world_size, batch, flags)}, one of each per turn."""
    speeds: dict[str, list[float]] = {name: [] for name in cells}
    with tempfile.TemporaryDirectory() as place:
        for turn in range(repeats):
            for number, (name, cell) in enumerate(cells.items()):
                speeds[name].append(images_per_second(Path(place), f"{turn}-{number}", *cell))
    return speeds


def exact(repeats: int) -> list[Row]:
    """Exact mode with M micro-batches against fast mode, one thread per process; one process alone where there is one GPU."""
    cells, bases = {}, {}
    for world_size in (1, 2) if count_gpus() != 1 else (1,):
        fast = f"{world_size} process{'es' * (world_size > 1)}, fast"
        for parts in (0, 1, 2, 4, 8):
            name = fast.replace("fast", f"exact, {parts} x {GLOBAL_BATCH_SIZE // parts}") if parts else fast
            if parts >= world_size or not parts:
                mode = f"--train.exact true --train.micro_batches {parts}" if parts else ""
                cells[name], bases[name] = (world_size, GLOBAL_BATCH_SIZE, mode), fast if parts else None
    return [Row(name, "images/s", values, bases[name]) for name, values in in_turns(cells, repeats).items()]


def scaling(repeats: int) -> list[Row]:
    """1 to N processes, one per GPU or core: the same global batch (strong), and the same share of it per process (weak)."""
    largest = count_gpus() or os.cpu_count() or 1
    sizes = [2**power for power in range(largest.bit_length()) if 2**power <= largest]
    cells = {f"strong, {size} x {GLOBAL_BATCH_SIZE // size}": (size, GLOBAL_BATCH_SIZE, "") for size in sizes}
    cells |= {f"weak, {size} x {GLOBAL_BATCH_SIZE}": (size, GLOBAL_BATCH_SIZE * size, "") for size in sizes}
    speeds = in_turns(cells, repeats)
    first = {kind: next(name for name in cells if name.startswith(kind)) for kind in ("strong", "weak")}
    return [Row(name, "images/s", values, first[name.split(",")[0]]) for name, values in speeds.items()]


def wandb(repeats: int) -> list[Row]:
    """A run that W&B's mirror follows, offline, against one without, with a row of metrics every 10 steps."""
    long = f"--train.max_steps {LONG} --eval.every_steps {LONG} --checkpoint.every_steps {LONG}"
    cells = {
        f"wandb.mode {mode}": (1, GLOBAL_BATCH_SIZE, f"{long} --wandb.mode {mode}") for mode in ("disabled", "offline")
    }
    first = next(iter(cells))
    return [
        Row(name, "images/s", speeds, None if name == first else first)
        for name, speeds in in_turns(cells, repeats).items()
    ]


def startup(repeats: int) -> list[Row]:
    """Seconds from the command on: of Python with torch, of the help, of an error, and of a whole training of one step."""
    commands = {
        "python -c 'import torch'": ("-c", "import torch"),
        "python -m train --help": ("-m", "train", "--help"),
        "python -m train --optim.lr x (an error)": ("-m", "train", "--optim.lr", "x"),
    }
    one_step = f"{RECIPE} --data.name digits --model.name tiny --train.max_steps 1"
    values: dict[str, list[float]] = {name: [] for name in (*commands, "a training of one step")}
    with tempfile.TemporaryDirectory() as place:
        for turn in range(repeats + 1):  # the first one fills the caches of files and data
            found = []
            for arguments in commands.values():
                began = time.perf_counter()
                subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
                found.append(time.perf_counter() - began)
            found.append(run(Path(place), f"{turn}", 1, one_step)["seconds"])
            for name, seconds in zip(values, found, strict=True):
                values[name] += [seconds] if turn else []
    return [
        Row(name, "s", seconds, "python -c 'import torch'" if name in list(values)[1:] else None)
        for name, seconds in values.items()
    ]


def time_to_accuracy(repeats: int, recipe: str) -> list[Row]:
    """Accuracy and seconds of a recipe over seeds 1 to n; the bare loop, measured before each, says how fast the machine was."""
    from launch.bench.measures import epoch_seconds

    found: dict[str, list[float]] = {name: [] for name in ("accuracy", "training", "command", "import", "epoch")}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(1, repeats + 1):
            noise = f"--config {recipe} --data.name random --wandb.mode disabled"
            found["epoch"].append(epoch_seconds(noise, bare=True))
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch"], check=True)
            found["import"].append(time.perf_counter() - began)
            done = run(Path(place), f"{seed}", 1, f"--config {recipe} --seed {seed}")
            summary = done["summary"]
            split = "ema_test" if "ema_test_accuracy" in summary else "test"
            found["accuracy"].append(100 * summary[f"{split}_accuracy"])
            found["training"].append(summary["train_seconds"])
            found["command"].append(done["seconds"])
    return [
        Row("test accuracy", "%", found["accuracy"]),
        Row("training", "s", found["training"], "an epoch of the bare loop"),
        Row("an epoch of the bare loop", "s", found["epoch"]),
        Row("the whole command", "s", found["command"], "python -c 'import torch'"),
        Row("python -c 'import torch'", "s", found["import"]),
    ]

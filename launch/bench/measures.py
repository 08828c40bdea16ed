"""What `launch bench` measures: the steps of our loop in this process, and trainings as users start them.

Every figure is a list of repeats, measured in turns, so that a noisy machine disturbs all rows alike. The speed of a
training is taken between two rows of its metrics, so that neither its start nor its end counts. torch is imported in
functions: importing this module costs nothing.
"""

import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.run import Ranks, count_gpus
from train.errors import RunError
from train.rundir import Row as MetricsRow
from train.rundir import RunDir, Summary

if TYPE_CHECKING:
    from torch import Tensor

    from train.config import Config
    from train.state import Plan, State
    from train.storage.data import Data

LOOP = (
    "--data.name random --model.name cnn --train.precision bf16 --train.global_batch_size 256 --log.every_steps 20 "
    "--train.max_steps 100000 --train.cuda_graphs on --wandb.mode disabled"
)
STEPS, WARM_UP_STEPS = 10, 8  # short turns: a busy machine changes its speed within a second
GPU_STEPS = 400  # ten take as long as waiting for them
SHARE, FIRST_STEP, LAST_STEP = 512, 20, 100  # of trainings: a batch, and the steps between which the speed is taken
RECIPE = (
    "--data.name random --data.random_examples 10240 --model.name cnn --train.precision bf16 --train.num_threads 1 "
    f"--log.every_steps 10 --train.max_steps {LAST_STEP} --eval.every_steps {LAST_STEP} "
    f"--checkpoint.every_steps {LAST_STEP}"
)
QUIET = "--log.progress false --log.report false --wandb.mode disabled"


@dataclass(frozen=True)
class Row:
    """One thing that was measured: a value per turn. `base` names the row that it is compared with."""

    name: str
    unit: str
    values: list[float]
    base: str | None = None


def in_turns(works: Mapping[str, Callable[[], float]], repeats: int, unit: str, base: str | None = None) -> list[Row]:
    """Measure each work once per turn, print each figure to stderr at once, and return a row for each work."""
    rows = [Row(name, unit, [], base if name != base else None) for name in works]
    for turn in range(1, repeats + 1):
        for row in rows:
            row.values.append(works[row.name]())
            print(f"turn {turn} of {repeats}: {row.name}: {number(row.values[-1])}", file=sys.stderr, flush=True)
    return rows


def number(value: float) -> str:
    """Write a figure with four significant digits, or all of its whole part."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def cpu_name() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Steps of one process: ours, and those of a bare loop.


@contextmanager
def opened(flags: str) -> Iterator[tuple["Plan", "State", Callable[[], None]]]:
    """Set up and warm up a run on one process; yield what makes its next step too. Close it in the end."""
    from train.cli import parse
    from train.state import set_up
    from train.step import prepare_step
    from train.storage import data
    from train.warmup import warm_up
    from train.world.world import World

    config = parse(flags.split())
    world = World.open(config.train)
    try:
        plan, state = set_up(config, world, data.load(config.data, world))
        take_step = warm_up(plan, state, lambda line: print(line, file=sys.stderr))

        def step() -> None:
            prepare_step(plan, state)
            take_step(plan, state)
            state.step += 1

        yield plan, state, step
    finally:
        world.close()


def bare_compute(config: "Config", source: "Data") -> Callable[["Tensor"], None]:
    """Return a plain PyTorch step on given examples: same model, optimizer, precision and data in memory."""
    import torch
    import torch.nn.functional as F

    from train.functional import optim
    from train.functional.augment import lay_out, normalize
    from train.storage import network

    device = source.train.images.device
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model: Any = network.build(config.model, source.shape, source.num_classes, config.seed).module
    model = model.to(device=device, memory_format=layout)
    optimizer = optim.build(config.optim, model)
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)

    def compute(rows: torch.Tensor) -> None:
        inputs = lay_out(normalize(source.train.images[rows], source.mean, source.std), layout)
        with torch.autocast(device.type, lower, enabled=lower is not None):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float(), source.train.labels[rows], label_smoothing=config.optim.label_smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return compute


def bare_step(config: "Config", source: "Data") -> Callable[[], object]:
    """Return the limit: a step of PyTorch alone with our batch, on a GPU as a CUDA graph where ours is one."""
    import torch

    from train.world import graphs

    device, batch = source.train.images.device, config.train.global_batch_size
    compute = bare_compute(config, source)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            yield from torch.randperm(len(source.train), device=device).split(batch)

    order = batches()
    if device.type != "cuda" or config.train.cuda_graphs == "off":
        return lambda: compute(next(order))
    graphs.leave_default_stream(device)
    kept = torch.arange(batch, device=device)
    for _ in range(graphs.CALLS_BEFORE):
        compute(kept)
    replay = graphs.record(lambda: compute(kept))

    def step() -> None:
        rows = next(order)
        if len(rows) < batch:
            compute(rows)
        else:
            kept.copy_(rows)
            replay()

    return step


def device_time() -> float:
    """Wait for the device and return the time in seconds."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(step: Callable[[], object], num_steps: int) -> float:
    """Return the seconds of some steps until the device has finished them."""
    began = device_time()
    for _ in range(num_steps):
        step()
    return device_time() - began


def epoch_seconds(flags: str, *, bare: bool) -> float:
    """Return the seconds of an epoch of our loop, or of the bare one, after a warm-up."""
    with opened(flags) as (plan, _, own_step):
        step = bare_step(plan.config, plan.data) if bare else own_step
        seconds_of(step, WARM_UP_STEPS)
        return seconds_of(step, plan.sampler.steps_per_epoch)


def throughput(repeats: int) -> list[Row]:
    """Measure our step and the bare one."""
    with opened(LOOP) as (plan, _, own_step):
        num_steps = GPU_STEPS if plan.world.device.type == "cuda" else STEPS
        num_examples = num_steps * plan.config.train.global_batch_size

        def speed(step: Callable[[], object]) -> float:
            return num_examples / seconds_of(step, num_steps)

        steps = {"bare loop": bare_step(plan.config, plan.data), "lockstep": own_step}
        works = {name: partial(speed, step) for name, step in steps.items()}
        for warm_up in works.values():
            warm_up()
        return in_turns(works, repeats, "images/s", "bare loop")


# Trainings, each in processes of its own.


def train(world_size: int, flags: str) -> tuple[list[MetricsRow], Summary, float]:
    """Train to the end in a temporary directory. Return (rows, summary, seconds of the command)."""
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nothing:
        arguments = [*QUIET.split(), *flags.split(), "--run.dir", place, "--run.name", "run"]
        began = time.perf_counter()
        if Ranks(world_size, arguments, output=nothing).wait():
            raise RunError(f"A training failed. See what `python -m train {' '.join(arguments)}` prints.")
        seconds, run = time.perf_counter() - began, RunDir(Path(place) / "run")
        summary = run.read_summary()
        assert summary
        return run.read_rows(), summary, seconds


def images_per_second(world_size: int, batch: int, flags: str) -> float:
    """Train on noise and return the speed after the warm-up."""
    rows, _, _ = train(world_size, f"{RECIPE} --train.global_batch_size {batch} {flags}")
    seconds = {row["step"]: row["train_seconds"] for row in rows if row["event"] == "train"}
    return batch * (LAST_STEP - FIRST_STEP) / (seconds[LAST_STEP] - seconds[FIRST_STEP])


def exact(repeats: int) -> list[Row]:
    """Measure exact mode with M micro-batches against fast mode, one thread per process."""
    rows = []
    names = {1: "1 process"} if count_gpus() == 1 else {1: "1 process", 2: "2 processes"}
    for world_size, name in names.items():
        works = {f"{name}, fast": partial(images_per_second, world_size, SHARE, "")}
        for parts in (1, 2, 4, 8):
            if parts >= world_size:
                flags = f"--train.exact true --train.num_micro_batches {parts}"
                work = partial(images_per_second, world_size, SHARE, flags)
                works[f"{name}, exact, {parts} x {SHARE // parts}"] = work
        rows += in_turns(works, repeats, "images/s", f"{name}, fast")
    return rows


def micro_batches(repeats: int) -> list[Row]:
    """Measure a network with BatchNorm on one process: its micro-batches in one pass, in several, and in exact mode."""
    works = {
        name: partial(images_per_second, 1, 128, f"--model.name vgg --train.num_threads 0 --train.{flags}")
        for name, flags in {
            "1 x 128": "num_micro_batches 1",
            "2 x 64, one pass": "num_micro_batches 2",
            "8 x 16, one pass": "num_micro_batches 8",
            "8 x 16, eight passes": "num_micro_batches 8 --train.max_micro_batch_size 16",
            "8 x 16, exact": "exact true --train.num_micro_batches 8",
        }.items()
    }
    return in_turns(works, repeats, "images/s", "1 x 128")


def scaling(repeats: int) -> list[Row]:
    """Measure 1 to N processes, one per GPU or core: one global batch (strong), or one share each (weak)."""
    sizes = [2**power for power in range((count_gpus() or count_cores()).bit_length())]
    strong = {f"strong, {n} x {SHARE // n}": partial(images_per_second, n, SHARE, "") for n in sizes}
    weak = {f"weak, {n} x {SHARE}": partial(images_per_second, n, SHARE * n, "") for n in sizes}
    rows = in_turns(strong, repeats, "images/s", f"strong, 1 x {SHARE}")
    return rows + in_turns(weak, repeats, "images/s", f"weak, 1 x {SHARE}")


def startup(repeats: int) -> list[Row]:
    """Measure the seconds of whole commands: Python with torch, the help, an error, and a training of one step."""

    def seconds(command: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, check=False)
        return time.perf_counter() - began

    commands = ("python -c 'import torch'", "python -m train --help", "python -m train --optim.lr x")
    works: dict[str, Callable[[], float]] = {command: partial(seconds, command) for command in commands}
    works["a training of one step"] = lambda: train(1, f"{RECIPE} --data.name digits --train.max_steps 1")[2]
    for work in works.values():
        work()  # fills the caches of files and data
    return in_turns(works, repeats, "s", commands[0])


def time_to_accuracy(repeats: int, recipe: str) -> list[Row]:
    """Measure a recipe over the seeds 1 to n. The bare loop, before each, shows how fast the machine was."""
    finished: list[Summary] = []

    def command() -> float:
        _, summary, seconds = train(1, f"--config {recipe} --seed {len(finished) + 1}")
        finished.append(summary)
        return seconds

    bare = "an epoch of the bare loop"
    noise = f"--config {recipe} --data.name random --wandb.mode disabled"
    works: dict[str, Callable[[], float]] = {
        bare: partial(epoch_seconds, noise, bare=True),
        "the whole command": command,
        "training": lambda: finished[-1].train_seconds,
    }
    timed = in_turns(works, repeats, "s", bare)
    accuracies = [100 * summary.final.accuracy for summary in finished if summary.final]
    return [Row("test accuracy", "%", accuracies), *timed]

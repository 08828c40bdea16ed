"""What `launch bench` measures: the parts of our loop in this process, and trainings as users start them.

The speed of a training is taken between two rows of its metrics, so that neither its start nor its end counts. torch is
imported in functions: importing this module costs nothing.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.bench.harness import Row, compared, in_turns
from launch.run import Ranks, count_gpus
from train.errors import RunError
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
BATCH, TEST_EXAMPLES = 512, 10_000
GLOBAL_BATCH_SIZE, FIRST_STEP = 512, 20  # of trainings; the steps after FIRST_STEP count
STEPS_OF = "--train.max_steps {0} --eval.every_steps {0} --checkpoint.every_steps {0}"
RECIPE = (
    "--data.name random --data.random_examples 10240 --model.name cnn --train.precision bf16 --train.num_threads 1 "
    f"--log.every_steps 10 {STEPS_OF.format(100)}"
)
QUIET = "--log.progress false --log.report false --wandb.mode disabled"
Cell = tuple[int, int, str]  # a training: world size, global batch size, flags
IMPORT_TORCH, BARE_EPOCH = "python -c 'import torch'", "an epoch of the bare loop"


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


def device_time() -> float:
    """Wait for the device and return the time in seconds."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object], times: int = 1) -> float:
    """Return the seconds that `times` calls take until the device has finished."""
    began = device_time()
    for _ in range(times):
        work()
    return device_time() - began


def rate(work: Callable[[], object], times: int, count: int) -> Callable[[], float]:
    """Warm up, and return a measurement: examples per second of `times` calls on `count` examples each."""
    seconds_of(work, times)
    return lambda: times * count / seconds_of(work, times)


def milliseconds(work: Callable[[], object], times: int) -> Callable[[], float]:
    """Warm up, and return a measurement: milliseconds per call, over `times` calls."""
    seconds_of(work, times)
    return lambda: 1000 * seconds_of(work, times) / times


def bare_compute(config: "Config", source: "Data") -> Callable[["Tensor"], None]:
    """Return a plain PyTorch step on given examples: same model, optimizer, precision and data in memory."""
    import torch
    import torch.nn.functional as F

    from train.functional import models, optim
    from train.functional.augment import lay_out, normalize

    device = source.train.images.device
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model = models.build(config.model, config.seed).to(device=device, memory_format=layout)  # type: ignore[call-overload]
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


def epoch_seconds(flags: str, *, bare: bool) -> float:
    """Return the seconds of an epoch of our loop, or of the bare one, after a warm-up."""
    with opened(flags) as (plan, _, own_step):
        step = bare_step(plan.config, plan.data) if bare else own_step
        seconds_of(step, WARM_UP_STEPS)
        return seconds_of(step, plan.sampler.steps_per_epoch)


def throughput(repeats: int) -> list[Row]:
    """Measure our step and the bare one."""
    with opened(LOOP) as (plan, _, own_step):
        steps = GPU_STEPS if plan.world.device.type == "cuda" else STEPS
        batch = plan.config.train.global_batch_size
        loops = {"bare loop": bare_step(plan.config, plan.data), "lockstep": own_step}
        works = {name: rate(step, steps, batch) for name, step in loops.items()}
        return compared(in_turns(works, repeats), "images/s", "bare loop")


def data(repeats: int) -> list[Row]:
    """Measure the images per second of each augmentation, batch by batch, and the seconds of an evaluation."""
    import torch

    from train.config import AugmentConfig
    from train.evaluate import evaluate
    from train.functional import rng
    from train.functional.augment import augment

    kinds = {
        "gather and normalize": AugmentConfig(),
        "shift 2": AugmentConfig(shift=2),
        "affine": AugmentConfig(shift=2, rotate=12, scale=0.1, shear=10),
        "erase": AugmentConfig(erase=0.5),
    }
    with opened(f"{LOOP} --data.random_examples {6 * TEST_EXAMPLES}") as (plan, state, _):
        source, device = plan.data, plan.world.device

        def batch(config: AugmentConfig) -> object:
            rows = torch.from_numpy(plan.sampler.examples(0, 0, BATCH)).to(device)
            keys = rng.row_keys(1, 0, BATCH, device)
            return augment(source.train.images[rows], keys, config, source.mean, source.std)

        options = (source, plan.config.eval.batch_size, plan.world, plan.memory_format)
        works = {name: rate(partial(batch, kind), 20, BATCH) for name, kind in kinds.items()}
        rows = [Row(name, "images/s", values) for name, values in in_turns(works, repeats).items()]
        whole = {"evaluation": lambda: seconds_of(lambda: evaluate(state.module, *options))}
        whole["evaluation"]()  # warm up
        return [*rows, Row(f"evaluation of {TEST_EXAMPLES:,} images", "s", in_turns(whole, repeats)["evaluation"])]


def sampler(repeats: int) -> list[Row]:
    """Measure the indices of one global batch of 512, in the middle of an epoch, and an order that is kept."""
    from train.functional.sampler import Sampler, epoch_order

    found: dict[str, list[float]] = {}
    for power in (3, 5, 7, 9, 12):  # one by one: only the last epoch's order is kept
        order = Sampler(10**power, BATCH, 1, 0)
        step = order.steps_per_epoch // 2
        work = milliseconds(partial(order.examples, step, 0, order.batch_rows(step)), 50)
        found |= in_turns({f"10^{power} examples": work}, repeats)
    whole = milliseconds(partial(epoch_order.__wrapped__, Sampler.kept_examples, 1), 1)
    found |= in_turns({f"once an epoch: the order of {Sampler.kept_examples:,}": whole}, repeats)
    return [Row(name, "ms", values) for name, values in found.items()]


def checkpoint(repeats: int) -> list[Row]:
    """Measure the parts of a save and of a load, with AdamW's two tensors per parameter."""
    from train.state import snapshot
    from train.storage import checkpoint as checkpoints

    with opened(f"{LOOP} --optim.name adamw --optim.ema 0.9") as opened_run, tempfile.TemporaryDirectory() as place:
        plan, state, step = opened_run
        step()
        saved = snapshot(plan, state)
        files, steps = checkpoints.encode(saved), itertools.count()
        staging = Path(tempfile.mkdtemp(dir=place))
        path = checkpoints.write(Path(place), 10**7, files, staging)
        parts: dict[str, Callable[[], object]] = {
            "collect the state": lambda: snapshot(plan, state),
            "encode": lambda: checkpoints.encode(saved),
            "write and sync": lambda: checkpoints.write(Path(place), next(steps), files, staging),
            "read and verify": lambda: checkpoints.read(path),
        }
        works = {name: milliseconds(part, 3) for name, part in parts.items()}
        rows = [Row(name, "ms", values) for name, values in in_turns(works, repeats).items()]
    return [*rows, Row("size", "MB", [sum(map(len, files.values())) / 1e6] * repeats)]


def train(world_size: int, *flags: str) -> tuple[list[dict[str, Any]], Summary, float]:
    """Train to the end in a temporary directory; later flags win. Return (rows, summary, seconds of the command)."""
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nothing:
        arguments = [*QUIET.split(), *" ".join(flags).split(), "--run.dir", place, "--run.name", "run"]
        began = time.perf_counter()
        if Ranks(world_size, arguments, output=nothing).wait():
            raise RunError(f"A training failed. See what `python -m train {' '.join(arguments)}` prints.")
        seconds, run = time.perf_counter() - began, RunDir(Path(place) / "run")
        summary = run.read_summary()
        assert summary
        return run.read_rows(), summary, seconds


def images_per_second(world_size: int, batch: int, flags: str) -> float:
    """Train on noise and return the speed after the warm-up."""
    rows, _, _ = train(world_size, f"{RECIPE} --train.global_batch_size {batch}", flags)
    seconds = {row["step"]: row["train_seconds"] for row in rows if row["event"] == "train"}
    last = max(seconds)
    return batch * (last - FIRST_STEP) / (seconds[last] - seconds[FIRST_STEP])


def speeds(cells: dict[str, Cell], bases: dict[str, str], repeats: int) -> list[Row]:
    """Measure the images per second of trainings, each against its base."""
    found = in_turns({name: partial(images_per_second, *cell) for name, cell in cells.items()}, repeats)
    return [Row(name, "images/s", values, bases.get(name)) for name, values in found.items()]


def exact(repeats: int) -> list[Row]:
    """Measure exact mode with M micro-batches against fast mode, one thread per process."""
    cells, bases = dict[str, Cell](), dict[str, str]()
    for world_size in (1, 2) if count_gpus() != 1 else (1,):
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        cells[f"{processes}, fast"] = (world_size, GLOBAL_BATCH_SIZE, "")
        for parts in (1, 2, 4, 8):
            if parts >= world_size:
                name = f"{processes}, exact, {parts} x {GLOBAL_BATCH_SIZE // parts}"
                cells[name] = (world_size, GLOBAL_BATCH_SIZE, f"--train.exact true --train.num_micro_batches {parts}")
                bases[name] = f"{processes}, fast"
    return speeds(cells, bases, repeats)


def scaling(repeats: int) -> list[Row]:
    """Measure 1 to N processes, one per GPU or core: one global batch (strong), or one share each (weak)."""
    largest = count_gpus() or os.cpu_count() or 1
    sizes = [2**power for power in range(largest.bit_length())]
    strong = {f"strong, {size} x {GLOBAL_BATCH_SIZE // size}": (size, GLOBAL_BATCH_SIZE, "") for size in sizes}
    weak = {f"weak, {size} x {GLOBAL_BATCH_SIZE}": (size, GLOBAL_BATCH_SIZE * size, "") for size in sizes}
    bases = {name: next(iter(cells)) for cells in (strong, weak) for name in cells}
    return speeds(strong | weak, bases, repeats)


def wandb(repeats: int) -> list[Row]:
    """Measure a run that logs to W&B, offline, against one that does not, with a row of metrics every 10 steps."""
    flags = f"{STEPS_OF.format(500)} --wandb.mode"  # many steps: its cost comes in bursts
    cells = {f"wandb.mode {mode}": (1, GLOBAL_BATCH_SIZE, f"{flags} {mode}") for mode in ("disabled", "offline")}
    return speeds(cells, {"wandb.mode offline": "wandb.mode disabled"}, repeats)


def command_seconds(*arguments: str) -> float:
    """Return the seconds that Python takes with these arguments."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - began


def startup(repeats: int) -> list[Row]:
    """Measure the seconds of whole commands: Python with torch, the help, an error, and a training of one step."""
    one_step = f"{RECIPE} --data.name digits --model.name tiny --train.max_steps 1"
    works: dict[str, Callable[[], float]] = {
        IMPORT_TORCH: partial(command_seconds, "-c", "import torch"),
        "python -m train --help": partial(command_seconds, "-m", "train", "--help"),
        "python -m train --optim.lr x (an error)": partial(command_seconds, "-m", "train", "--optim.lr", "x"),
        "a training of one step": lambda: train(1, one_step)[2],
    }
    for work in works.values():
        work()  # fills the caches of files and data
    return compared(in_turns(works, repeats), "s", IMPORT_TORCH)


def time_to_accuracy(repeats: int, recipe: str) -> list[Row]:
    """Measure a recipe over the seeds 1 to n. The bare loop, before each, shows how fast the machine was."""
    finished: list[Summary] = []

    def command() -> float:
        _, summary, seconds = train(1, f"--config {recipe} --seed {len(finished) + 1}")
        finished.append(summary)
        return seconds

    noise = f"--config {recipe} --data.name random --wandb.mode disabled"
    works: dict[str, Callable[[], float]] = {
        BARE_EPOCH: partial(epoch_seconds, noise, bare=True),
        IMPORT_TORCH: partial(command_seconds, "-c", "import torch"),
        "the whole command": command,
        "training": lambda: finished[-1].train_seconds,
    }
    found = in_turns(works, repeats)
    accuracies = [100 * summary.final.accuracy for summary in finished if summary.final]
    bases = {"training": BARE_EPOCH, BARE_EPOCH: None, "the whole command": IMPORT_TORCH, IMPORT_TORCH: None}
    timed = [Row(name, "s", found[name], base) for name, base in bases.items()]
    return [Row("test accuracy", "%", accuracies), *timed]

"""What `launch bench` measures inside this process: our loop against a bare one, and the loop's parts.

torch and train are imported in functions: importing this module costs nothing.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launch.bench.harness import Row

if TYPE_CHECKING:
    from train.config import Config
    from train.run import Run
    from train.storage.data import Data

LOOP = (
    "--data.name random --model.name cnn --train.precision bf16 --train.global_batch_size 256 --log.every_steps 20 "
    "--train.max_steps 100000 --train.cuda_graphs on --wandb.mode disabled"
)
STEPS, WARM_UP_STEPS = 10, 8  # short turns: a busy machine changes its speed within a second
GPU_STEPS = 400  # where ten take as long as it takes to wait for them
BATCH, TEST_EXAMPLES = 512, 10_000


@contextmanager
def opened(flags: str) -> Iterator["Run"]:
    """A run, set up and warmed up on one process, and closed in the end."""
    from train.cli import parse
    from train.run import set_up
    from train.storage import data
    from train.warmup import warm_up
    from train.world.world import World

    config = parse(flags.split())
    world = World.open(config.train)
    try:
        run = set_up(config, world, data.load(config.data, world))
        warm_up(run, print)
        yield run
    finally:
        world.close()


def seconds_of(work: Callable[[], object], times: int = 1) -> float:
    """Seconds that `times` calls take, read after the device has finished."""
    import torch

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    for _ in range(times):
        work()
    return now() - began


def in_turns(
    works: Mapping[str, Callable[[], object]], repeats: int, times: int, warm_up: int
) -> dict[str, list[float]]:
    """Seconds per call of each work, in turns of `times` calls."""
    for work in works.values():
        seconds_of(work, warm_up)
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(seconds_of(work, times) / times)
    return found


def bare_step(config: "Config", source: "Data") -> Callable[[], object]:
    """The limit: a step of PyTorch alone with the same model, optimizer, batch, precision and data in memory.

    On a GPU a CUDA graph, as ours is where it can.
    """
    import torch
    import torch.nn.functional as F

    from train.functional import models, optim
    from train.functional.augment import lay_out, normalize
    from train.world import graphs

    device = source.train.images.device
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model = models.build(config.model, config.seed).to(device=device, memory_format=layout)  # type: ignore[call-overload]
    optimizer = optim.build(config.optim, model)
    batch, lower = (
        config.train.global_batch_size,
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision),
    )

    def batches() -> Iterator[torch.Tensor]:
        while True:
            yield from torch.randperm(len(source.train), device=device).split(batch)

    order = batches()

    def compute(rows: torch.Tensor) -> None:
        inputs = lay_out(normalize(source.train.images[rows], source.mean, source.std), layout)
        with torch.autocast(device.type, lower, enabled=lower is not None):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float(), source.train.labels[rows], label_smoothing=config.optim.label_smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

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
    """Seconds of an epoch of our loop, or of the bare one, after a warm-up."""
    from train.step import train_step

    with opened(flags) as run:
        step = bare_step(run.config, run.data) if bare else lambda: train_step(run)
        seconds_of(step, WARM_UP_STEPS)
        return seconds_of(step, run.sampler.steps_per_epoch)


def throughput(repeats: int) -> list[Row]:
    """Our step and the bare one, in turns."""
    from train.step import train_step

    with opened(LOOP) as run:
        works = {"bare loop": bare_step(run.config, run.data), "lockstep": lambda: train_step(run)}
        steps = GPU_STEPS if run.world.device.type == "cuda" else STEPS
        found = in_turns(works, repeats, steps, WARM_UP_STEPS)
        batch = run.config.train.global_batch_size
    speeds = {name: [batch / seconds for seconds in values] for name, values in found.items()}
    return [
        Row(name, "images/s", values, None if name == "bare loop" else "bare loop") for name, values in speeds.items()
    ]


def data(repeats: int) -> list[Row]:
    """Images per second of each augmentation, batch by batch, and the seconds of an evaluation."""
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
    with opened(f"{LOOP} --data.random_examples {6 * TEST_EXAMPLES}") as run:
        source, device = run.data, run.world.device

        def batch(config: AugmentConfig) -> object:
            rows = torch.from_numpy(run.sampler.examples(0, 0, BATCH)).to(device)
            keys = rng.row_keys(1, 0, BATCH, device)
            return augment(source.train.images[rows], keys, config, source.mean, source.std)

        works = {name: partial(batch, config) for name, config in kinds.items()}
        found = in_turns(works, repeats, 20, 3)
        options = (source, run.config.eval.batch_size, run.world, run.memory_format)
        evaluation = in_turns({"evaluation": lambda: evaluate(run.module, *options)}, repeats, 1, 1)
    rows = [Row(name, "images/s", [BATCH / seconds for seconds in values]) for name, values in found.items()]
    return [*rows, Row(f"evaluation of {TEST_EXAMPLES:,} images", "s", evaluation["evaluation"])]


def sampler(repeats: int) -> list[Row]:
    """Milliseconds for the indices of one global batch of 512, in the middle of an epoch, and of an order that is kept."""
    from train.functional.sampler import Sampler, epoch_order

    rows = []
    for power in (3, 5, 7, 9, 12):
        order, name = Sampler(10**power, BATCH, 1, 0), f"10^{power} examples"
        step = order.steps_per_epoch // 2
        work = partial(order.examples, step, 0, order.batch_rows(step))
        seconds = in_turns({name: work}, repeats, 50, 5)[name]  # one by one: only the last epoch's order is kept
        rows.append(Row(name, "ms", [1000 * s for s in seconds]))
    whole = in_turns({"": partial(epoch_order.__wrapped__, Sampler.kept_examples, 1)}, repeats, 1, 1)[""]
    return [*rows, Row(f"once an epoch: the order of {Sampler.kept_examples:,}", "ms", [1000 * s for s in whole])]


def checkpoint(repeats: int) -> list[Row]:
    """Milliseconds of the parts of a save and of a load, with AdamW's two tensors per parameter."""
    from train.run import make_state
    from train.step import train_step
    from train.storage import checkpoint as checkpoints

    with opened(f"{LOOP} --optim.name adamw --optim.ema 0.9") as run, tempfile.TemporaryDirectory() as place:
        train_step(run)
        state = make_state(run)
        files = checkpoints.encode(state)
        step = iter(range(10**6))
        staging = Path(tempfile.mkdtemp(dir=place))
        path = checkpoints.write(Path(place), 10**7, files, staging)
        works = {
            "collect the state": lambda: make_state(run),
            "encode": lambda: checkpoints.encode(state),
            "write and sync": lambda: checkpoints.write(Path(place), next(step), files, staging),
            "read and verify": lambda: checkpoints.read(path),
        }
        found = in_turns(works, repeats, 3, 1)
    size = sum(map(len, files.values())) / 1e6
    rows = [Row(name, "ms", [1000 * seconds for seconds in values]) for name, values in found.items()]
    return [*rows, Row("size", "MB", [size] * repeats)]

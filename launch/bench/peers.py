"""`launch bench peers`: the same CNN, optimizer, batch and precision on MNIST-like images, in each peer's own idiom.

Every peer gets what its documentation recommends for speed: worker processes that stay, pinned memory, channels_last, bf16, no
logging and no checkpoints, and the number of workers that is fastest here. Images are decoded and normalized by torchvision as
its MNIST class does it. The fastest setting of a peer counts. Each measurement has a process of its own: what one sets for
itself, such as our allocator's options, is not the next one's.
"""

import itertools
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from launch.bench.harness import Row
from launch.bench.measures import LOOP, epoch_seconds, opened, seconds_of
from train.errors import UserError

if TYPE_CHECKING:
    from train.config import Config

NUM_EXAMPLES, WARM_UP_STEPS = 10_240, 4


class Pictures:
    """What torchvision.datasets.MNIST does per item, over images uint8 [N,28,28] and labels int64 [N]."""

    def __init__(self, images: Any, labels: Any) -> None:
        from PIL import Image
        from torchvision import transforms

        self.images, self.labels, self.picture = images, labels, Image.fromarray
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.picture(self.images[index])), int(self.labels[index])


def worker_counts() -> list[int]:
    """Return the numbers of loader processes that are tried: 0, and the powers of two up to the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [0, *(2**power for power in range(cores.bit_length()))]


def loader(images: Any, labels: Any, batch: int, workers: int) -> Any:
    """A DataLoader over PIL images and torchvision transforms, as the official examples build it."""
    import torch
    from torch.utils import data  # the project's own loop has no DataLoader; this is what it is compared with

    make: Any = getattr(data, "DataLoader")  # noqa: B009
    on_gpu = torch.cuda.is_available()
    pictures = Pictures(images, labels)
    return make(pictures, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0, pin_memory=on_gpu)


def device_type() -> str:
    """Where everything is measured, as ours with train.device auto."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def ingredients(config: "Config") -> tuple[Any, Any]:
    """The model in channels_last and its optimizer: the same for all."""
    import torch

    from train.functional import models, optim

    model: Any = models.build(config.model, config.seed)
    model = model.to(device=device_type(), memory_format=torch.channels_last)
    return model, optim.build(config.optim, model)


def dataloader_epoch(config: "Config", batches: Any) -> float:
    """PyTorch alone: autocast around the forward pass; seconds of an epoch after the warm-up."""
    import torch
    import torch.nn.functional as F

    model, optimizer = ingredients(config)
    device = device_type()

    def step(inputs: Any, labels: Any) -> None:
        inputs = inputs.to(device, non_blocking=True, memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(inputs), labels.to(device, non_blocking=True))
        loss.backward()
        optimizer.step()

    return timed_epoch(batches, step)


def accelerate_epoch(config: "Config", batches: Any) -> float:
    """The way of Accelerate's examples: prepare, then accelerator.backward."""
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device_type() == "cpu", mixed_precision="bf16")
    model, optimizer, prepared = accelerator.prepare(*ingredients(config), batches)

    def step(inputs: Any, labels: Any) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs.to(memory_format=torch.channels_last)), labels)
        accelerator.backward(loss)
        optimizer.step()

    return timed_epoch(prepared, step)


def timed_epoch(batches: Any, step: Callable[[Any, Any], None]) -> float:
    """Warm up, then return the seconds of one epoch."""
    for inputs, labels in itertools.islice(batches, WARM_UP_STEPS):
        step(inputs, labels)

    def epoch() -> None:
        for inputs, labels in batches:
            step(inputs, labels)

    return seconds_of(epoch)


def lightning_epoch(config: "Config", batches: Any) -> float:
    """Lightning's Trainer with logger, checkpoints, progress bar and summary off; the second of two epochs counts."""
    import lightning
    import torch
    import torch.nn.functional as F

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model, optimizer = ingredients(config)
    marks: list[float] = []

    def mark() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    class Module(lightning.LightningModule):
        """The model as Lightning wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Any:
            inputs, labels = batch
            return F.cross_entropy(self.model(inputs.to(memory_format=torch.channels_last)), labels)

        def configure_optimizers(self) -> Any:
            return optimizer

        def on_train_epoch_start(self) -> None:
            mark()

        def on_train_epoch_end(self) -> None:
            mark()

    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator=device_type(),
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), batches)
    return marks[3] - marks[2]


PEERS: dict[str, Callable[["Config", Any], float]] = {
    "DataLoader and torchvision": dataloader_epoch,
    "Accelerate's examples": accelerate_epoch,
    "Lightning's Trainer": lightning_epoch,
}


def with_workers(
    epoch: Callable[["Config", Any], float], config: "Config", images: Any, labels: Any, workers: int
) -> float:
    """Seconds of a peer's epoch with a number of loader processes."""
    return epoch(config, loader(images, labels, config.train.global_batch_size, workers))


def peers(repeats: int) -> list[Row]:
    """Images per second of the bare loop, of ours and of every peer, in turns."""
    try:
        import lightning  # noqa: F401
    except ImportError as error:
        raise UserError("bench peers needs Lightning: pip install 'lockstep[bench]'.") from error
    flags = f"{LOOP} --data.random_examples {NUM_EXAMPLES}"
    with opened(flags) as run:
        config = run.config
        images, labels = run.data.train.images[:, 0].cpu().numpy(), run.data.train.labels.cpu().numpy()

    def measured(work: Callable[[], float]) -> float:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            return fresh.submit(work).result()

    works = {
        "lockstep": partial(epoch_seconds, flags, bare=False),
        "bare loop": partial(epoch_seconds, flags, bare=True),
    }
    for name, epoch in PEERS.items():
        candidates = {
            workers: partial(with_workers, epoch, config, images, labels, workers) for workers in worker_counts()
        }
        seconds = {workers: measured(work) for workers, work in candidates.items()}
        fastest = min(seconds, key=seconds.__getitem__)
        works[f"{name}, {fastest} worker(s)"] = candidates[fastest]
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            speeds[name].append(NUM_EXAMPLES / measured(work))
    return [
        Row(name, "images/s", values, None if name == "lockstep" else "lockstep") for name, values in speeds.items()
    ]

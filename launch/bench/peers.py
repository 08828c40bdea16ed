"""`launch bench peers`: the same CNN, optimizer, batch and precision on MNIST-like images, in each peer's own idiom.

Every peer gets what its documentation recommends for speed: worker processes that stay, pinned memory, channels_last,
bf16, no logging and no checkpoints. Images are decoded and normalized as torchvision's MNIST class does it. Each
measurement has a process of its own, so that one peer's settings, such as our allocator's options, do not reach the
next.
"""

import itertools
import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from launch.bench.harness import Row, compared, in_turns
from launch.bench.measures import LOOP, device_time, epoch_seconds, opened
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


def device_type() -> str:
    """Return the device of all measurements, the one that train.device auto selects."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def ingredients(config: "Config") -> tuple[Any, Any]:
    """Build the model in channels_last and its optimizer: the same for all."""
    import torch

    from train.functional import models, optim

    model: Any = models.build(config.model, config.seed)
    model = model.to(device=device_type(), memory_format=torch.channels_last)
    return model, optim.build(config.optim, model)


def timed_epoch(batches: Any, step: Callable[[Any, Any], None]) -> float:
    """Warm up, then return the seconds of one epoch."""
    for inputs, labels in itertools.islice(batches, WARM_UP_STEPS):
        step(inputs, labels)
    began = device_time()
    for inputs, labels in batches:
        step(inputs, labels)
    return device_time() - began


def dataloader_epoch(config: "Config", batches: Any) -> float:
    """PyTorch alone, with autocast around the forward pass."""
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
    """Follow Accelerate's examples: prepare, then accelerator.backward."""
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


def lightning_epoch(config: "Config", batches: Any) -> float:
    """Use Lightning's Trainer with logger, checkpoints, progress bar and summary off; time the second of two epochs."""
    import lightning
    import torch
    import torch.nn.functional as F

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model, optimizer = ingredients(config)
    marks: list[float] = []

    def mark(module: Any) -> None:
        marks.append(device_time())

    class Module(lightning.LightningModule):
        """The model as Lightning wants it."""

        on_train_epoch_start = on_train_epoch_end = mark

        def training_step(self, batch: Any, index: int) -> Any:
            inputs, labels = batch
            return F.cross_entropy(model(inputs.to(memory_format=torch.channels_last)), labels)

        def configure_optimizers(self) -> Any:
            return optimizer

    module = Module()
    module.model = model  # Lightning moves and trains what is an attribute
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: Any = {"accelerator": device_type(), "devices": 1, "precision": "bf16-mixed", **dict.fromkeys(off, False)}
    lightning.Trainer(max_epochs=2, **options).fit(module, batches)
    return marks[3] - marks[2]


PEERS: dict[str, Callable[["Config", Any], float]] = {
    "DataLoader and torchvision": dataloader_epoch,
    "Accelerate's examples": accelerate_epoch,
    "Lightning's Trainer": lightning_epoch,
}


def peer_seconds(peer: str, config: "Config", images: Any, labels: Any, workers: int) -> float:
    """Return the seconds of a peer's epoch with a DataLoader as the official examples build it."""
    from torch.utils import data  # the project's own loop has no DataLoader; this is what it is compared with

    make: Any = getattr(data, "DataLoader")  # noqa: B009
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device_type() == "cuda"}
    loader = make(Pictures(images, labels), config.train.global_batch_size, shuffle=True, **options)
    return PEERS[peer](config, loader)


def speed(work: Callable[[], float]) -> float:
    """Run an epoch in a fresh process and return its images per second."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return NUM_EXAMPLES / fresh.submit(work).result()


def peers(repeats: int) -> list[Row]:
    """Measure the images per second of ours, of the bare loop and of every peer with its fastest number of workers."""
    try:
        import lightning  # noqa: F401
    except ImportError as error:
        raise UserError("bench peers needs Lightning: pip install 'lockstep[bench]'.") from error
    flags = f"{LOOP} --data.random_examples {NUM_EXAMPLES}"
    with opened(flags) as (plan, _, _):
        config, split = plan.config, plan.data.train
        images, labels = split.images[:, 0].cpu().numpy(), split.labels.cpu().numpy()
    works = {
        "lockstep": partial(speed, partial(epoch_seconds, flags, bare=False)),
        "bare loop": partial(speed, partial(epoch_seconds, flags, bare=True)),
    }
    for peer in PEERS:
        candidates = {
            f"{peer}, {workers} worker(s)": partial(speed, partial(peer_seconds, peer, config, images, labels, workers))
            for workers in worker_counts()
        }
        found = in_turns(candidates, 1)
        fastest = max(found, key=lambda name: found[name][0])
        works[fastest] = candidates[fastest]
    return compared(in_turns(works, repeats), "images/s", "lockstep")

"""`launch bench peers`: the same CNN, optimizer, batch and precision on MNIST-like images, in each peer's own idiom.

Every peer gets what its documentation recommends for speed: worker processes that stay, pinned memory, channels_last,
bf16, no logging and no checkpoints. Images come from torchvision's MNIST class, over noise instead of its files. Each
measurement has a process of its own, so that one peer's settings, such as our allocator's options, do not reach the
next. Each trains two epochs and the second counts: the first one starts the workers and warms up.
"""

import importlib.util
import logging
import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from launch.bench.measures import LOOP, Row, count_cores, device_time, epoch_seconds, in_turns
from train.errors import UserError

NUM_EXAMPLES = 10_240


def second_epoch(batches: Any, step: Callable[[Any, Any], None]) -> float:
    """Train two epochs and return the seconds of the second."""
    seconds = 0.0
    for _ in range(2):
        began = device_time()
        for inputs, labels in batches:
            step(inputs, labels)
        seconds = device_time() - began
    return seconds


def dataloader_epoch(model: Any, optimizer: Any, batches: Any, device: str) -> float:
    """PyTorch alone, with autocast around the forward pass."""
    import torch
    import torch.nn.functional as F

    def step(inputs: Any, labels: Any) -> None:
        inputs = inputs.to(device, non_blocking=True, memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(inputs), labels.to(device, non_blocking=True))
        loss.backward()
        optimizer.step()

    return second_epoch(batches, step)


def accelerate_epoch(model: Any, optimizer: Any, batches: Any, device: str) -> float:
    """Follow Accelerate's examples: prepare, then accelerator.backward."""
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16")
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    def step(inputs: Any, labels: Any) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs.to(memory_format=torch.channels_last)), labels)
        accelerator.backward(loss)
        optimizer.step()

    return second_epoch(batches, step)


def lightning_epoch(model: Any, optimizer: Any, batches: Any, device: str) -> float:
    """Use Lightning's Trainer with logger, checkpoints, progress bar and summary off."""
    import lightning
    import torch
    import torch.nn.functional as F

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
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

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: Any = {"accelerator": device, "devices": 1, "precision": "bf16-mixed", **dict.fromkeys(off, False)}
    module = Module()
    module.model = model  # Lightning moves and trains what is an attribute
    lightning.Trainer(max_epochs=2, **options).fit(module, batches)
    return marks[3] - marks[2]


PEERS = {
    "DataLoader and torchvision": dataloader_epoch,
    "Accelerate's examples": accelerate_epoch,
    "Lightning's Trainer": lightning_epoch,
}


def peer_seconds(peer: str, flags: str, workers: int) -> float:
    """Return the seconds of a peer's epoch with a DataLoader as the official examples build it."""
    import torch
    from torch.utils import data  # the project's own loop has no DataLoader; this is what it is compared with
    from torchvision import datasets, transforms

    from train.cli import parse
    from train.functional import models, optim
    from train.storage.built_in import read_random

    config, device = parse(flags.split()), "cuda" if torch.cuda.is_available() else "cpu"
    noise = read_random(config.data.random_examples)
    images = object.__new__(datasets.MNIST)  # its constructor reads files
    images.data, images.targets = noise.tensors["train_images"], noise.tensors["train_labels"]
    images.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    images.target_transform = None
    make: Any = getattr(data, "DataLoader")  # noqa: B009
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device == "cuda"}
    batches = make(images, config.train.global_batch_size, shuffle=True, **options)
    model: Any = models.build(config.model, (1, *images.data.shape[1:]), len(noise.class_names), config.seed)
    model = model.to(device=device, memory_format=torch.channels_last)
    return PEERS[peer](model, optim.build(config.optim, model), batches, device)


def speed(work: Callable[[], float]) -> float:
    """Run an epoch in a fresh process and return its images per second."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return NUM_EXAMPLES / fresh.submit(work).result()


def worker_counts() -> list[int]:
    """Return the numbers of loader processes that are tried: 0, and the powers of two up to the cores."""
    return [0, *(2**power for power in range(count_cores().bit_length()))]


def peers(repeats: int) -> list[Row]:
    """Measure the images per second of ours, of the bare loop and of every peer with its fastest number of workers."""
    if importlib.util.find_spec("lightning") is None:
        raise UserError("bench peers needs Lightning: pip install 'lockstep[bench]'.")
    flags = f"{LOOP} --data.random_examples {NUM_EXAMPLES}"
    works = {
        "lockstep": partial(speed, partial(epoch_seconds, flags, bare=False)),
        "bare loop": partial(speed, partial(epoch_seconds, flags, bare=True)),
    }
    for peer in PEERS:
        candidates = {
            f"{peer}, {workers} worker(s)": partial(speed, partial(peer_seconds, peer, flags, workers))
            for workers in worker_counts()
        }
        fastest = max(in_turns(candidates, 1, "images/s"), key=lambda row: row.values[0])
        works[fastest.name] = candidates[fastest.name]
    return in_turns(works, repeats, "images/s", "lockstep")

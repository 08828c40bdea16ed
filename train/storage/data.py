"""A data set by name or in a file -> train and test Split on the device.

Invariant: a run trains on verified data or not at all. Channels, height, width and classes come from here, and from
nowhere else. Parsed data are cached in one safetensors file per source, together with their SHA-256. A second start
therefore imports neither torchvision nor scikit-learn, which takes 2 s, and all ranks of a machine map the same file.
The user's own file is copied there too, because it may be overwritten during a run. The first process of a machine
prepares the data under a file lock while the others wait. All images lie on the device; data that do not fit there are
refused.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from train.config import DataConfig
from train.errors import UserError
from train.rundir import write_atomically
from train.storage import arrays
from train.storage.arrays import Arrays, check_fits
from train.storage.built_in import (
    PUBLISHED,
    DataMissing,
    cache_dir,
    find_file,
    find_folder,
    read_digits,
    read_published,
    read_random,
)
from train.storage.lease import flock
from train.world.world import World

CACHE_SCHEMA = 3  # increase it when the same files are parsed to other tensors

Prepared = tuple[Arrays, str]  # and their SHA-256


@dataclass(frozen=True)
class Split:
    """Images uint8 [N,C,H,W] and labels int64 [N], both on the rank's device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """Both splits, and the facts about them that a run uses or records."""

    name: str  # of a built-in data set, or of the file
    train: Split
    test: Split
    eval_split: str  # what `test` is: "test", or "validation"
    class_names: list[str]
    sha256: str  # of all arrays as they were read
    mean: list[float]  # of each channel's training pixels, 0..255
    std: list[float]
    is_fallback: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """How many classes there are: labels are 0 .. num_classes - 1."""
        return len(self.class_names)

    def facts(self) -> dict[str, Any]:
        """Return what a model needs of the data, as a checkpoint and an exported file hold it."""
        names = ("name", "shape", "class_names", "mean", "std")
        return {name: getattr(self, name) for name in names}

    def summary(self) -> dict[str, Any]:
        """Return the entry in summary.json."""
        sizes = {"num_train_examples": len(self.train), f"num_{self.eval_split}_examples": len(self.test)}
        return {**self.facts(), **sizes, "is_fallback": self.is_fallback}


def content_sha256(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def cache_file(config: DataConfig) -> Path:
    """Return the cache file of this source. A different or touched source file has another one."""
    source: list[Any] = [CACHE_SCHEMA, config.name if config.path is None else None]
    paths = [config.path] if config.path else []
    if config.name in PUBLISHED:
        folder = find_folder(config)
        paths = [find_file(folder, file) for file in PUBLISHED[config.name].files]
    for path in paths:
        status = path.stat()
        source += [str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    tag = hashlib.sha256(repr(source).encode()).hexdigest()[:16]
    return cache_dir() / f"{short(config.name)}-{tag}.safetensors"


def short(name: str) -> str:
    """Return what the cache's files of a source begin with: file systems allow 255 bytes in all."""
    return Path(name).stem[:30]


def load_cache(path: Path) -> Prepared | None:
    """Return the cached arrays, mapped from the file, and their SHA-256. None if they are missing or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return None
    found = content_sha256(tensors)
    return (Arrays(tensors, facts["class_names"]), found) if found == facts.get("sha256") else None


def read(config: DataConfig) -> Arrays:
    """Read and check a source. Raises UserError, and DataMissing if its files were not found."""
    if config.path:
        return arrays.read(config.path)
    return read_digits() if config.name == "digits" else read_published(config)


def prepare(config: DataConfig) -> Prepared:
    """Return the arrays of a source and their SHA-256, from the cache if possible. Otherwise fill the cache first."""
    if config.path:
        arrays.num_bytes(config.path)  # refuses what is no file
    if config.name == "random":
        found = read_random(config.random_examples)
        return found, content_sha256(found.tensors)
    # Cache files are only ever replaced as a whole, so reading needs no lock.
    with contextlib.suppress(DataMissing):
        if (cached := load_cache(cache_file(dataclasses.replace(config, download=False)))) is not None:
            return cached
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        path = cache_dir() / f"{short(config.name)}.lock"
        lock = path.open("w")
        flock(lock.fileno(), fcntl.LOCK_EX, path, "Each process may prepare the data.")
    except OSError as error:
        raise UserError(
            f"The cache {cache_dir()} cannot be written: {error.strerror}. Set XDG_CACHE_HOME to a writable directory."
        ) from error
    with lock:
        path = cache_file(config)
        if (cached := load_cache(path)) is not None:  # another process filled it while we waited
            return cached
        found = read(config)
        sha256 = content_sha256(found.tensors)
        # one entry: safetensors writes several in any order
        metadata = {"facts": json.dumps({"sha256": sha256, "class_names": found.class_names})}
        # With a full disk there is no cache, but the run continues.
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent) as staging:
            write_atomically(path, safetensors.torch.save(found.tensors, metadata), Path(staging))
        return load_cache(path) or (found, sha256)


def load_on_all_ranks(config: DataConfig, world: World, *, is_fallback: bool = False) -> Data:
    """Prepare the data in one process of each machine, then in the others, and put them on each rank's device.

    Collective: every rank must call it.
    """
    prepared = None
    for is_my_turn in (world.local_rank == 0, world.local_rank != 0):
        with world.raising_together():
            prepared = prepare(config) if is_my_turn else prepared
    assert prepared is not None
    with world.raising_together():  # devices have different free memory
        return split(config, prepared, world.device, is_fallback=is_fallback)


def load(config: DataConfig, world: World, notify: Callable[[str], None] = print) -> Data:
    """Return the data on this rank's device. Collective: every rank must call it.

    If the files are missing, raises DataMissing on every rank, or with `data.fallback` warns and returns the digits.
    """
    with world.raising_together():
        if config.path:
            check_memory(arrays.num_bytes(config.path), world.device, str(config.path))
    try:
        return load_on_all_ranks(config, world)
    except DataMissing as missing:
        if not config.fallback:
            raise
        if world.is_main:
            notify(
                f"warning: training on digits, 1,797 small images of scikit-learn, instead of {config.name}. {missing}"
            )
    return load_on_all_ranks(dataclasses.replace(config, name="digits"), world, is_fallback=True)


def check_memory(num_bytes: int, device: torch.device, what: str) -> None:
    """Raise UserError, with both sizes, if data need more bytes than a device has free."""
    check_fits(num_bytes, free_bytes(device), what, "GPU memory" if device.type == "cuda" else "memory")


def free_bytes(device: torch.device) -> int:
    """Return how many bytes of a device's memory are free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def split(config: DataConfig, prepared: Prepared, device: torch.device, *, is_fallback: bool = False) -> Data:
    """Put the training split and the one to evaluate on the device. Raises UserError if the config does not fit."""
    (found, sha256), name, count = prepared, Path(config.name).name, config.validation
    parts = {
        part: (found.tensors[f"{part}_images"], found.tensors[f"{part}_labels"])
        for part in ("train", "validation", "test")
        if f"{part}_images" in found.tensors
    }
    images, labels = parts["train"]
    if count and "validation" in parts:
        raise UserError(f"data.validation is {count}, but {name} has a validation split of its own. Leave it at 0.")
    if count >= len(labels):
        raise UserError(f"data.validation is {count}, but {name} has {len(labels)} training examples. Use fewer.")
    if count:
        parts["train"], parts["validation"] = (images[:-count], labels[:-count]), (images[-count:], labels[-count:])
        missing = set(labels.tolist()) - set(labels[:-count].tolist())
        if missing and config.path:
            which = f"all training examples of class {found.class_names[min(missing)]}"
            raise UserError(f"data.validation is {count}, which holds out {which} of {name}. Shuffle the file.")
    eval_split = (
        ("validation" if "validation" in parts else "test") if config.eval_split == "auto" else config.eval_split
    )
    if eval_split not in parts:
        raise UserError(f"data.eval_split is validation, and {name} has none. Hold examples out: --data.validation N.")
    used = [parts["train"], parts[eval_split]]
    check_memory(sum(tensor.nbytes for part in used for tensor in part), device, name)
    mean, std = moments(parts["train"][0])
    if not all(std):
        raise UserError(f"All training images of {name} have one colour, {mean}. Expected pictures of something.")
    train, evaluated = (Split(as_channels(images).to(device), labels.to(device)) for images, labels in used)
    return Data(name, train, evaluated, eval_split, found.class_names, sha256, mean, std, is_fallback)


def as_channels(images: Tensor) -> Tensor:
    """Return images [N,H,W] or [N,H,W,C] as a view [N,C,H,W]."""
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)


def moments(images: Tensor) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of each channel's pixels; images uint8 [N,H,W] or [N,H,W,C]."""
    mean, std, values = [], [], np.arange(256)
    for channel in as_channels(images).unbind(1):
        # Sums of integers are exact, so every machine gets the same constants.
        histogram = torch.bincount(channel.reshape(-1), minlength=256).numpy()
        mean.append(float((histogram * values).sum() / histogram.sum()))
        std.append(float(((histogram * values**2).sum() / histogram.sum() - mean[-1] ** 2) ** 0.5))
    return mean, std

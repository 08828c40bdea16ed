"""Find, verify and parse a data set -> train and test Split on the device.

Invariant: a run trains on verified data (checksum, counts, shapes, label range) or not at all. The parsed tensors are
cached in one safetensors file per source, together with their SHA-256. A second start therefore imports neither
torchvision nor scikit-learn, which takes 2 s, and all ranks of a machine map the same file. The first process of a
machine prepares the data under a file lock while the others wait.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor

from train.config import DataConfig, class_names
from train.errors import UserError, one_line
from train.functional.hashing import GOLDEN, mix64
from train.rundir import write_atomically
from train.world.world import World

FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's class names
FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
COUNTS = {"train": 60000, "t10k": 10000}
MAX_FILE_BYTES = 200_000_000  # the largest file has 26,421,880
DOWNLOAD_TIMEOUT_SECONDS = 10
CACHE_SCHEMA = 2  # increase it when the same files are parsed to other tensors

Prepared = tuple[dict[str, Tensor], str]  # train/t10k images and labels, uint8, and their SHA-256


class DataMissing(UserError):
    """The files were not found, so `data.fallback` applies. Damaged files are an error with or without it."""


@dataclass(frozen=True)
class Split:
    """Images uint8 [N,1,28,28] and labels int64 [N], both on the rank's device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """Both splits, and the facts about them that a run uses or records."""

    name: str
    train: Split
    test: Split
    eval_split: str  # what `test` is: "test", or "validation" if examples were held out
    sha256: str  # of both splits as they were read
    mean: float  # of the training pixels, 0..255
    std: float
    is_fallback: bool

    @property
    def class_names(self) -> list[str]:
        """One name per label."""
        return class_names(self.name)

    def summary(self) -> dict[str, Any]:
        """Return the entry in summary.json."""
        sizes = {"num_train_examples": len(self.train), f"num_{self.eval_split}_examples": len(self.test)}
        return {"name": self.name, **sizes, "sha256": self.sha256, "is_fallback": self.is_fallback}


def cache_dir() -> Path:
    """Return the directory for parsed and downloaded data: $XDG_CACHE_HOME/lockstep or ~/.cache/lockstep."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"


def read_file(path: Path, md5: str) -> bytes:
    """Return the content of a gzip file, unpacked. Raises UserError unless the file has this MD5."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:  # reading a pipe or a device would never end
            raise UserError(f"{path} is not a file of at most {MAX_FILE_BYTES:,} bytes. Get it again.")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Get it again.") from error
    if (found := hashlib.md5(content).hexdigest()) != md5:
        raise UserError(f"{path} has MD5 {found}, expected {md5}. Delete it and get it again.")
    return gzip.decompress(content)


def read_folder(name: str, folder: Path) -> dict[str, Tensor]:
    """Read the four files of a data set in MNIST's format -> train/t10k images and labels, uint8.

    The checksums prove the content, so a file is its header (LeCun's IDX format) and the bytes of its array.
    """
    import torchvision.datasets

    md5s = dict(getattr(torchvision.datasets, FOLDERS[name]).resources)
    tensors = {}
    for file in FILES:
        part, kind = file.split("-")[:2]
        header, shape = (16, (COUNTS[part], 28, 28)) if kind == "images" else (8, (COUNTS[part],))
        content = bytearray(read_file(folder / file, md5s[file]))
        tensors[f"{part}_{kind}"] = torch.frombuffer(content, dtype=torch.uint8, offset=header).reshape(shape)
    return tensors


def read_digits() -> dict[str, Tensor]:
    """Return scikit-learn's 1,797 digits (UCI, 8x8 pixels), resized to 28x28. A fixed fifth is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).to(torch.float32)[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, (28, 28), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8)[:, 0]
    labels = torch.from_numpy(digits.target).to(torch.uint8)
    # A hash draws the fifth. The labels repeat in order, so every fifth example would give a split with 5.8 % ones.
    order = mix64(np.arange(len(labels), dtype=np.uint64) * np.uint64(GOLDEN)).argsort(kind="stable")
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[torch.from_numpy(order[: len(labels) // 5])] = True
    return {
        "train_images": images[~is_test],
        "train_labels": labels[~is_test],
        "t10k_images": images[is_test],
        "t10k_labels": labels[is_test],
    }


def read_random(num_examples: int) -> dict[str, Tensor]:
    """Return fixed noise with random labels: `num_examples` for training and a sixth as many for the test."""
    generator = np.random.Generator(np.random.PCG64(0))
    tensors = {}
    for part, size in (("train", num_examples), ("t10k", num_examples // 6)):
        tensors[f"{part}_images"] = torch.from_numpy(generator.integers(0, 256, (size, 28, 28), dtype=np.uint8))
        tensors[f"{part}_labels"] = torch.from_numpy(generator.integers(0, 10, size, dtype=np.uint8))
    return tensors


def missing_files(folder: Path) -> list[str]:
    """Return those of the four files that a folder lacks."""
    return [file for file in FILES if not (folder / file).exists()]


def find_folder(config: DataConfig) -> Path:
    """Return the folder with the data set's files, downloading them if allowed. Raises DataMissing if there is none.

    Looks in data.root if given, else in $MNIST_ROOT and then in the cache, in torchvision's layout or flat.
    """
    roots = [Path(config.root)] if config.root else [cache_dir() / "data"]
    if not config.root and os.environ.get("MNIST_ROOT"):
        roots.insert(0, Path(os.environ["MNIST_ROOT"]))
    subfolder = Path(FOLDERS[config.name]) / "raw"
    for folder in (root / layout for root in roots for layout in (subfolder, ".")):
        if not missing_files(folder):
            return folder
    places = " or ".join(f"{root / subfolder} (no {missing_files(root / subfolder)[0]})" for root in roots)
    reason = "--data.download is false"
    if config.download:
        try:
            return download(config.name, roots[-1])
        except Exception as error:  # torchvision and urllib raise many types
            reason = f"downloading failed: {one_line(error, 80)}"
    raise DataMissing(
        f"{config.name} not found in {places}, and {reason}. Set MNIST_ROOT or --data.root to a folder with the four "
        f".gz files (`python -m launch data --name {config.name} --root DIR` downloads them), or pass "
        "--data.fallback true to train on digits."
    )


def download(name: str, root: Path) -> Path:
    """Download a data set with torchvision, from its mirrors and with its checksums, and return its folder."""
    import torchvision.datasets

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # a firewall that drops packets would block for minutes
    try:
        getattr(torchvision.datasets, FOLDERS[name])(str(root), download=True)
    finally:
        socket.setdefaulttimeout(timeout)
    return root / FOLDERS[name] / "raw"


def content_sha256(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def cache_file(config: DataConfig) -> Path:
    """Return the cache file of this source. A different or touched source file has another one."""
    source: list[Any] = [CACHE_SCHEMA, config.name]
    if config.name in FOLDERS:
        folder = find_folder(config)
        for path in (folder / file for file in FILES):
            status = path.stat()
            source += [str(path.resolve()), status.st_size, status.st_mtime_ns]
    tag = hashlib.sha256(repr(source).encode()).hexdigest()[:16]
    return cache_dir() / f"{config.name}-{tag}.safetensors"


def load_cache(path: Path) -> Prepared | None:
    """Return the cached tensors, mapped from the file, and their SHA-256. None if they are missing or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return None
    found = content_sha256(tensors)
    return (tensors, found) if found == expected else None


def prepare(config: DataConfig) -> Prepared:
    """Return the parsed tensors and their SHA-256, from the cache if possible. Otherwise fill the cache first."""
    if config.name == "random":
        tensors = read_random(config.random_examples)
        return tensors, content_sha256(tensors)
    # Cache files are only ever replaced as a whole, so reading needs no lock.
    with contextlib.suppress(DataMissing):
        if (cached := load_cache(cache_file(dataclasses.replace(config, download=False)))) is not None:
            return cached
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_dir() / f"{config.name}.lock").acquire()
    except OSError as error:
        raise UserError(
            f"The cache {cache_dir()} cannot be written: {error.strerror}. Set XDG_CACHE_HOME to a writable directory."
        ) from error
    with lock:
        path = cache_file(config)
        if (cached := load_cache(path)) is not None:  # another process filled it while we waited
            return cached
        tensors = read_digits() if config.name == "digits" else read_folder(config.name, find_folder(config))
        sha256 = content_sha256(tensors)
        # With a full disk there is no cache, but the run continues.
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent) as staging:
            write_atomically(path, safetensors.torch.save(tensors, {"sha256": sha256}), Path(staging))
        return load_cache(path) or (tensors, sha256)


def prepare_on_all_ranks(config: DataConfig, world: World) -> Prepared:
    """Prepare the data in one process of each machine, then in the others. Collective: every rank must call it."""
    prepared = None
    for is_my_turn in (world.local_rank == 0, world.local_rank != 0):
        with world.raising_together():
            prepared = prepare(config) if is_my_turn else prepared
    assert prepared is not None
    return prepared


def load(config: DataConfig, world: World, notify: Callable[[str], None] = print) -> Data:
    """Return the data on this rank's device. Collective: every rank must call it.

    If the files are missing, raises DataMissing on every rank, or with `data.fallback` warns and returns the digits.
    """
    try:
        return split(config, config.name, prepare_on_all_ranks(config, world), world.device)
    except DataMissing as missing:
        if not config.fallback:
            raise
        if world.is_main:
            notify(
                f"warning: training on digits, 1,797 small images of scikit-learn, instead of {config.name}. {missing}"
            )
    return split(config, "digits", prepare_on_all_ranks(DataConfig(name="digits"), world), world.device)


def split(config: DataConfig, name: str, prepared: Prepared, device: torch.device) -> Data:
    """Put parsed tensors on the device, and hold out the last `data.validation` training examples if that is set."""
    tensors, sha256 = prepared
    images, labels = tensors["train_images"], tensors["train_labels"]
    test_images, test_labels = tensors["t10k_images"], tensors["t10k_labels"]
    if config.validation >= len(labels):
        raise UserError(
            f"data.validation is {config.validation}, but {name} has {len(labels)} training examples. Use fewer."
        )
    if config.validation:
        images, test_images = images[: -config.validation], images[-config.validation :]
        labels, test_labels = labels[: -config.validation], labels[-config.validation :]
    # Sums of integers are exact, so every machine gets the same two constants.
    histogram, values = torch.bincount(images.reshape(-1), minlength=256).numpy(), np.arange(256)
    mean = float((histogram * values).sum() / histogram.sum())
    std = float(((histogram * values**2).sum() / histogram.sum() - mean**2) ** 0.5)
    return Data(
        name=name,
        train=Split(images[:, None].to(device), labels.long().to(device)),
        test=Split(test_images[:, None].to(device), test_labels.long().to(device)),
        eval_split="validation" if config.validation else "test",
        sha256=sha256,
        mean=mean,
        std=std,
        is_fallback=name != config.name,
    )

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
import math
import os
import socket
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from train.config import DataConfig, class_names
from train.errors import UserError, one_line
from train.functional.hashing import GOLDEN, mix64
from train.rundir import write_atomically
from train.world.world import World

FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's class names
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
COUNTS = {"train": 60000, "t10k": 10000}
MAX_FILE_BYTES = 200_000_000  # the largest file has 47,040,016
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


def parse_idx(content: bytes, source: Path) -> NDArray[np.uint8]:
    """Parse an IDX file of unsigned bytes (LeCun's format: 0, 0, 8, ndim, big-endian int32 sizes, data).

    Raises UserError, naming the file, if it is malformed.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or not 1 <= content[3] <= 3:
        start = content[:4].hex() or "nothing"
        raise UserError(f"{source} starts with {start}, expected 000008, an IDX file of bytes. Get it again.")
    header = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:header].ljust(header - 4, b"\0"), ">u4").astype(int).tolist())
    expected = header + math.prod(shape)  # numpy's product would overflow
    if len(content) != expected:
        raise UserError(f"{source} has {len(content)} bytes, expected {expected} for shape {shape}. Get it again.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_file(path: Path, md5: str) -> NDArray[np.uint8]:
    """Read `path`.gz, verified against its MD5, or the unpacked `path` if there is no such file."""
    packed = path.with_name(f"{path.name}.gz")
    source = packed if packed.exists() else path
    try:
        if not source.is_file() or source.stat().st_size > MAX_FILE_BYTES:  # reading a pipe or a device would never end
            raise UserError(f"{source} is not a file of at most {MAX_FILE_BYTES:,} bytes. Get it again.")
        content = source.read_bytes()
        if source == packed:
            if (found := hashlib.md5(content).hexdigest()) != md5:
                raise UserError(f"{source} has MD5 {found}, expected {md5}. Delete it and get it again.")
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source} cannot be read: {error}. Get it again.") from error
    return parse_idx(content, source)


def read_folder(name: str, folder: Path) -> dict[str, Tensor]:
    """Read and check the four files of a data set in MNIST's format -> train/t10k images and labels, uint8."""
    import torchvision.datasets

    md5s = {Path(file).stem: md5 for file, md5 in getattr(torchvision.datasets, FOLDERS[name]).resources}
    tensors = {}
    for file in FILES:
        array = read_file(folder / file, md5s[file])
        part, kind = file.split("-")[:2]
        expected = (COUNTS[part], 28, 28) if kind == "images" else (COUNTS[part],)
        if array.shape != expected:
            raise UserError(f"{folder / file} holds shape {array.shape}, expected {expected}. Get it again.")
        if kind == "labels" and array.max() > 9:
            raise UserError(f"{folder / file} holds label {array.max()}, expected 0 to 9. Get it again.")
        tensors[f"{part}_{kind}"] = torch.from_numpy(array.copy())
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
    """Return those of the four files that are in a folder neither packed nor unpacked."""
    return [file for file in FILES if not any((folder / name).exists() for name in (file, f"{file}.gz"))]


def find_folder(config: DataConfig) -> Path:
    """Return the folder with the data set's files, downloading them if allowed. Raises DataMissing if there is none.

    Search in data.root if given, else in $MNIST_ROOT and then in the cache, in torchvision's layout or flat.
    """
    roots = [Path(config.root)] if config.root else [cache_dir() / "data"]
    if not config.root and os.environ.get("MNIST_ROOT"):
        roots.insert(0, Path(os.environ["MNIST_ROOT"]))
    subfolder = Path(FOLDERS[config.name]) / "raw"
    for folder in (root / layout for root in roots for layout in (subfolder, ".")):
        if not missing_files(folder):
            return folder
    places = " or ".join(f"{root / subfolder} (no {missing_files(root / subfolder)[0]}.gz)" for root in roots)
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
        for path in sorted(find_folder(config).glob("*-ubyte*")):
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
        error = None
        try:
            prepared = prepare(config) if is_my_turn else prepared
        except UserError as found:
            error = found
        world.raise_on_all_ranks(error)
    assert prepared is not None
    return prepared


def load(config: DataConfig, world: World, notify: Callable[[str], None] = print) -> Data:
    """Return the data on this rank's device. Collective: every rank must call it.

    If the files are missing, raises DataMissing on every rank, or with `data.fallback` warns and returns the digits.
    """
    try:
        return split(config, config.name, prepare_on_all_ranks(config, world), world.device, is_fallback=False)
    except DataMissing as missing:
        if not config.fallback:
            raise
        if world.is_main:
            notify(
                f"warning: training on digits, 1,797 small images of scikit-learn, instead of {config.name}. {missing}"
            )
    digits = prepare_on_all_ranks(DataConfig(name="digits"), world)
    return split(config, "digits", digits, world.device, is_fallback=True)


def split(config: DataConfig, name: str, prepared: Prepared, device: torch.device, *, is_fallback: bool) -> Data:
    """Put parsed tensors on the device, and hold out the last `data.validation` training examples if that is set."""
    tensors, sha256 = prepared
    images, labels = tensors["train_images"], tensors["train_labels"]
    test_images, test_labels = tensors["t10k_images"], tensors["t10k_labels"]
    if config.validation:
        num_train = len(labels) - config.validation
        if num_train <= 0:
            raise UserError(
                f"data.validation is {config.validation}, but {name} has {len(labels)} training examples. Use fewer."
            )
        images, test_images = images[:num_train], images[num_train:]
        labels, test_labels = labels[:num_train], labels[num_train:]
    # Sums of integers are exact, so every machine gets the same two constants.
    histogram = torch.bincount(images.reshape(-1), minlength=256).numpy()
    values = np.arange(256)
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
        is_fallback=is_fallback,
    )

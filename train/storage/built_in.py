"""The data sets that have a name: five downloaded by torchvision in two formats, scikit-learn's digits, and noise.

Invariant: data are those that were published. Checksums decide, not names, so that damaged, forged or other data are an
error, with or without `data.fallback`. Those of MNIST are of the unpacked files: it may be packed again, unpacked or
renamed. For the other data sets only checksums of the published files are known, so nothing else can be verified.
torchvision and scikit-learn are imported in functions.
"""

import contextlib
import gzip
import hashlib
import io
import os
import re
import socket
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.cli import expand_path
from train.config import DataConfig
from train.errors import UserError, one_line
from train.functional.hashing import GOLDEN, mix64
from train.storage.arrays import Arrays, read_idx

MAX_FILE_BYTES = 200_000_000  # the largest file has 26,421,880
DOWNLOAD_TIMEOUT_SECONDS = 10


class DataMissing(UserError):
    """The files were not found, so `data.fallback` applies. Damaged files are an error with or without it."""


@dataclass(frozen=True)
class Published:
    """A data set that torchvision downloads."""

    dataset: str  # torchvision's class
    folder: str  # below the root
    files: tuple[str, ...]
    shape: tuple[int, int, int] = (1, 28, 28)  # channels, height, width
    num_classes: int = 10
    num_train: int = 60_000
    num_test: int = 10_000

    def folders(self, root: Path) -> list[Path]:
        """Return where to look for the files: below a root, in torchvision's layout or flat, or in the root itself."""
        root, (name, _, rest) = root.absolute(), self.folder.partition("/")
        folders = [root / self.folder]
        if root.name in (name, name.lower()):
            folders.append(root / rest)
        return [*folders, root / name, root] if self.files == IDX_FILES else folders

    def missing_files(self, folder: Path) -> list[str]:
        """Return those of the files that a folder lacks."""
        return [file for file in self.files if not os.path.exists(find_file(folder, file))]


IDX_FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
MNIST_MD5 = (  # of IDX_FILES, unpacked
    "6bbc9ace898e44ae57da46a324031adb",
    "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea",
    "27ae3e4e09519cfbb04c329615203637",
)
CIFAR10_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
PUBLISHED = {
    "mnist": Published("MNIST", "MNIST/raw", IDX_FILES),
    "fashion_mnist": Published("FashionMNIST", "FashionMNIST/raw", IDX_FILES),
    "kmnist": Published("KMNIST", "KMNIST/raw", IDX_FILES),
    "cifar10": Published("CIFAR10", "cifar-10-batches-py", CIFAR10_FILES, (3, 32, 32), 10, 50_000),
    "cifar100": Published("CIFAR100", "cifar-100-python", ("train", "test", "meta"), (3, 32, 32), 100, 50_000),
}


def cache_dir() -> Path:
    """Return the directory for parsed and downloaded data: $XDG_CACHE_HOME/lockstep or ~/.cache/lockstep."""
    return Path(expand_path("$XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "lockstep"


def find_file(folder: Path, file: str) -> Path:
    """Return the path of a file in a folder. A packed IDX file may be unpacked there, and named as Kaggle and 7-Zip do.

    They write train-images.idx3-ubyte, and also put a file into a folder of the same name.
    """
    plain, names = file.removesuffix(".gz"), [file]
    if file in IDX_FILES:
        names = [name + suffix for suffix in (".gz", "") for name in (plain, plain.replace("-idx", ".idx"))]
    paths = [folder / name for name in names]
    paths += [path / name for path in paths for name in names]
    return next(filter(os.path.isfile, paths), folder / file)  # Path.is_file raises where a folder may not be read


def find_folder(config: DataConfig) -> Path:
    """Return the folder with the data set's files, downloading them if allowed. Raises DataMissing if there is none.

    Looks in data.root if given, else in $MNIST_ROOT and then in the cache.
    """
    published = PUBLISHED[config.name]
    roots = [Path(config.root)] if config.root else [cache_dir() / "data"]
    if not config.root and os.environ.get("MNIST_ROOT"):
        roots.insert(0, Path(expand_path("$MNIST_ROOT", os.environ["MNIST_ROOT"])))
    for folder in (folder for root in roots for folder in published.folders(root)):
        if not published.missing_files(folder):
            return folder
    nearest = [min(published.folders(root), key=lambda folder: len(published.missing_files(folder))) for root in roots]
    places = " or ".join(f"{folder} (no {published.missing_files(folder)[0]})" for folder in nearest)
    reason, failure = "--data.download is false", ""
    if config.download:
        try:
            return download(published, roots[-1])
        except Exception as error:  # torchvision and urllib raise many types
            reason, failure = "downloading failed", f" The download's error: {cause(error)}"
    raise DataMissing(
        f"{config.name} not found in {places}, and {reason}. Set MNIST_ROOT or --data.root to a folder with its "
        f"files (`python -m launch data --name {config.name} --root DIR` downloads them), or pass "
        f"--data.fallback true to train on digits.{failure}"
    )


def title(config: DataConfig) -> str:
    """Return a data set's name, and the folder of its files if it has any. Raises DataMissing."""
    return f"{config.name} ({find_folder(config)})" if config.name in PUBLISHED else config.name


def cause(error: Exception) -> str:
    """Return why a download failed, once for all mirrors that agree, without what torchvision and urllib add."""
    lines = re.findall(r"got:\n(.+)", str(error)) or [one_line(error, 400)]
    causes = [re.sub(r"<urlopen error (?:\[Errno [^]]+\] )?(.+)>", r"\1", line).rstrip(".") for line in lines]
    return "; ".join(dict.fromkeys(causes))


def download(published: Published, root: Path) -> Path:
    """Download a data set with torchvision, from its mirrors and with its checksums, and return its folder."""
    import torchvision.datasets

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # a firewall that drops packets would block for minutes
    try:
        getattr(torchvision.datasets, published.dataset)(str(root), download=True)
    finally:
        socket.setdefaulttimeout(timeout)
    return root / published.folder


def known_files() -> dict[str, tuple[str, str]]:
    """Return the data set and the name of each IDX file whose MD5 is known, by that MD5."""
    import torchvision.datasets

    known = {md5: ("mnist", file) for file, md5 in zip(IDX_FILES, MNIST_MD5, strict=True)}
    for name in (name for name, published in PUBLISHED.items() if published.files == IDX_FILES):
        resources = getattr(torchvision.datasets, PUBLISHED[name].dataset).resources
        known |= {md5: (name, file) for file, md5 in resources}
    return known


def read_file(path: Path, name: str, file: str) -> bytes:
    """Return the unpacked content of an IDX file. Raises UserError unless it is this file of the data set `name`."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:  # reading a pipe or a device would never end
            raise UserError(f"{path} is not a file of at most {MAX_FILE_BYTES:,} bytes. Get it again.")
        packed = content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Get it again.") from error
    with contextlib.suppress(OSError, EOFError, zlib.error):  # not packed, or damaged
        content = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(MAX_FILE_BYTES)
    known, sums = known_files(), [hashlib.md5(data, usedforsecurity=False).hexdigest() for data in (packed, content)]
    found = [known[md5] for md5 in sums if md5 in known]
    if (name, file) in found:
        return content
    try:
        read_idx(packed, str(path))  # refuses what is empty, cut off, a web page or no IDX file for another reason
    except UserError as error:
        raise UserError(f"{error} Delete it and get it again.") from None
    if found:
        problem = f"holds {found[0][1]} of {found[0][0]}, expected {file} of {name}"
    elif name == "mnist":
        problem = f"holds other data than {file} of mnist"
    else:
        problem = f"cannot be verified: expected the published {file} of {name}, the only one with a known checksum"
    raise UserError(
        f"{path} {problem}. Put the published file there, or use another --data.root. For data of your own, use "
        "`python -m launch data --from DIR` (docs/your-own.md)."
    )


def read_published(config: DataConfig) -> Arrays:
    """Read the files of a data set that torchvision downloads, where `find_folder` finds them."""
    import torchvision.datasets

    folder = find_folder(config)
    dataset = getattr(torchvision.datasets, PUBLISHED[config.name].dataset)
    if issubclass(dataset, torchvision.datasets.CIFAR10):
        return read_cifar(dataset, folder)
    tensors = {}
    for file in IDX_FILES:
        path = find_file(folder, file)
        part, kind = file.replace("t10k", "test").split("-")[:2]
        values = torch.from_numpy(read_idx(read_file(path, config.name, file), str(path)))
        tensors[f"{part}_{kind}"] = values.long() if kind == "labels" else values
    return Arrays(tensors, [name.partition(" - ")[0] for name in dataset.classes])  # MNIST's are "0 - zero" and so on


def read_cifar(dataset: Any, folder: Path) -> Arrays:
    """Read CIFAR-10 or CIFAR-100 with torchvision, which unpickles the files once their MD5 is right."""
    try:
        parts = {part: dataset(str(folder.parent), train=part == "train") for part in ("train", "test")}
    except RuntimeError as error:
        raise UserError(f"{folder} is damaged: {one_line(error, 80)}. Delete it and get it again.") from None
    tensors = {f"{part}_images": torch.from_numpy(read.data).contiguous() for part, read in parts.items()}
    tensors |= {f"{part}_labels": torch.tensor(read.targets) for part, read in parts.items()}
    return Arrays(tensors, parts["train"].classes)


def read_digits() -> Arrays:
    """Return scikit-learn's 1,797 digits (UCI, 8x8 pixels), resized to 28x28. A fixed fifth is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).to(torch.float32)[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, (28, 28), mode="bilinear", align_corners=False)
    images, labels = large.round().clamp(0, 255).to(torch.uint8).squeeze(1), torch.from_numpy(digits.target).long()
    # A hash draws the fifth. The labels repeat in order, so every fifth example would give a split with 5.8 % ones.
    order = mix64(np.arange(len(labels), dtype=np.uint64) * np.uint64(GOLDEN)).argsort(kind="stable")
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[torch.from_numpy(order[: len(labels) // 5])] = True
    parts = {"train": ~is_test, "test": is_test}
    tensors = {f"{part}_images": images[rows] for part, rows in parts.items()}
    return Arrays(tensors | {f"{part}_labels": labels[rows] for part, rows in parts.items()}, list("0123456789"))


def read_random(num_examples: int) -> Arrays:
    """Return fixed noise with random labels: `num_examples` for training and a sixth as many for the test."""
    generator = np.random.Generator(np.random.PCG64(0))
    tensors = {}
    for part, size in (("train", num_examples), ("test", num_examples // 6)):
        tensors[f"{part}_images"] = torch.from_numpy(generator.integers(0, 256, (size, 28, 28), dtype=np.uint8))
        labels = generator.integers(0, 10, size, dtype=np.uint8)
        tensors[f"{part}_labels"] = torch.from_numpy(labels).long()
    return Arrays(tensors, list("0123456789"))

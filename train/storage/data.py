"""Get, verify and parse a data set -> train and test Split on the device.

Invariant: what is trained on was verified (checksum, counts, shapes, label range), or nothing is trained on. The parsed
tensors are cached in one safetensors file per source, which carries their SHA-256: the second start imports neither
torchvision nor scikit-learn. The first process of a machine prepares under a file lock while the others wait.
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

from train.config import DataConfig
from train.errors import UserError
from train.functional.hashing import GOLDEN, mix64
from train.labels import class_names
from train.world.world import World

FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's class names
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
COUNTS = {"train": 60000, "t10k": 10000}
MAX_FILE_BYTES = 200_000_000  # the largest has 47,040,016
DOWNLOAD_TIMEOUT_SECONDS = 10
CACHE_SCHEMA = 2  # count up when the same files are parsed to other tensors


class DataMissing(UserError):
    """The files are nowhere: what `data.fallback` is for. Damaged files are an error with or without it."""


@dataclass(frozen=True)
class Split:
    """Images uint8 [N,1,28,28] and labels int64 [N], both on the rank's device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """Both splits and what a run must know and remember of them."""

    name: str
    train: Split
    test: Split
    eval_split: str  # "test", or "validation" where examples were held out for it
    sha256: str  # over both splits as they were read
    mean: float  # of the training pixels, 0..255
    std: float
    is_fallback: bool

    @property
    def class_names(self) -> list[str]:
        """One name per label."""
        return class_names(self.name)

    def summary(self) -> dict[str, Any]:
        """What summary.json says of the data."""
        sizes = {"num_train_examples": len(self.train), f"num_{self.eval_split}_examples": len(self.test)}
        return {"name": self.name, **sizes, "sha256": self.sha256, "is_fallback": self.is_fallback}


def cache_dir() -> Path:
    """The directory for parsed and downloaded data: $XDG_CACHE_HOME/lockstep or ~/.cache/lockstep."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"


def parse_idx(content: bytes, source: Path) -> NDArray[np.uint8]:
    """Parse an IDX file of unsigned bytes (LeCun's format: 0, 0, 8, ndim, big-endian int32 sizes, data).

    Raises UserError that names the file, what was expected and what was found.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or not 1 <= content[3] <= 3:
        raise UserError(
            f"{source} starts with {content[:4].hex() or 'nothing'}; an IDX file of bytes starts with 000008."
        )
    header = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:header].ljust(header - 4, b"\0"), ">u4").astype(int).tolist())
    expected = header + math.prod(shape)  # numpy's product would overflow
    if len(content) != expected:
        raise UserError(
            f"{source} has {len(content)} bytes; its header, of shape {shape}, promises {expected}. Get it anew."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_file(path: Path, md5: str) -> NDArray[np.uint8]:
    """Read `path`.gz (checked against its MD5) or, where there is none, the unpacked `path`."""
    packed = path.with_name(path.name + ".gz")
    present = packed if packed.exists() else path
    try:
        if not present.is_file() or present.stat().st_size > MAX_FILE_BYTES:  # a pipe or a device would never end
            raise UserError(f"{present} is not a file of at most {MAX_FILE_BYTES:,} bytes. Get it anew.")
        if present is path:
            return parse_idx(path.read_bytes(), path)
        content = packed.read_bytes()
        if (found := hashlib.md5(content).hexdigest()) != md5:
            raise UserError(
                f"{packed} has MD5 {found}, expected {md5}: it is damaged or another file. Delete it and get it anew."
            )
        return parse_idx(gzip.decompress(content), packed)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}. Get it anew.") from error


def read_folder(name: str, folder: Path) -> dict[str, Tensor]:
    """Parse and check the four files of a data set in MNIST's format -> train/t10k images and labels, uint8."""
    import torchvision.datasets  # 2 s: only where no cache is there yet

    md5s = {Path(file).stem: md5 for file, md5 in getattr(torchvision.datasets, FOLDERS[name]).resources}
    tensors = {}
    for file in FILES:
        array = read_file(folder / file, md5s[file])
        part, kind = file.split("-")[:2]
        expected = (COUNTS[part], 28, 28) if kind == "images" else (COUNTS[part],)
        if array.shape != expected:
            raise UserError(f"{folder / file} holds shape {array.shape}, expected {expected}.")
        if kind == "labels" and array.max() > 9:
            raise UserError(f"{folder / file} holds label {array.max()}, expected 0 to 9.")
        tensors[f"{part}_{kind}"] = torch.from_numpy(array.copy())
    return tensors


def read_digits() -> dict[str, Tensor]:
    """The 1,797 real digits that scikit-learn carries (UCI, 8x8 pixels), resized to 28x28; a fixed fifth is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).to(torch.float32)[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, (28, 28), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8)[:, 0]
    labels = torch.from_numpy(digits.target).to(torch.uint8)
    # A hash draws the fifth: every fifth example would hold 5.8 % ones, since the order of the labels repeats.
    drawn = mix64(np.arange(len(labels), dtype=np.uint64) * np.uint64(GOLDEN)).argsort(kind="stable")[
        : len(labels) // 5
    ]
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[torch.from_numpy(drawn)] = True
    parts = {"train": ~is_test, "t10k": is_test}
    return {
        f"{part}_{kind}": t[at] for part, at in parts.items() for kind, t in (("images", images), ("labels", labels))
    }


def read_random(num_examples: int) -> dict[str, Tensor]:
    """Noise with random labels, the same everywhere: `num_examples` to train on and a sixth of it to test on."""
    generator = np.random.Generator(np.random.PCG64(0))
    sizes = {"train": num_examples, "t10k": num_examples // 6}
    tensors = {}
    for part, size in sizes.items():
        tensors[f"{part}_images"] = torch.from_numpy(generator.integers(0, 256, (size, 28, 28), dtype=np.uint8))
        tensors[f"{part}_labels"] = torch.from_numpy(generator.integers(0, 10, size, dtype=np.uint8))
    return tensors


def find_folder(config: DataConfig) -> Path:
    """Return the folder with the data set's files, downloading them if allowed; raise DataMissing with the ways to get them.

    Looked for in data.root if given, else in $MNIST_ROOT and then in the cache; in torchvision's layout or flat.
    """
    roots = [Path(config.root)] if config.root else [cache_dir() / "data"]
    if not config.root and os.environ.get("MNIST_ROOT"):
        roots.insert(0, Path(os.environ["MNIST_ROOT"]))
    subfolder = Path(FOLDERS[config.name]) / "raw"
    for folder in [root / sub for root in roots for sub in (subfolder, ".")]:
        if all((folder / file).exists() or (folder / f"{file}.gz").exists() for file in FILES):
            return folder
    folders = [root / subfolder for root in roots]
    absent = [
        [file for file in FILES if not any((at / f"{file}{end}").exists() for end in ("", ".gz"))] for at in folders
    ]
    why = "no " + " or ".join(f"{at}/{files[0]}.gz" for at, files in zip(folders, absent, strict=True))
    if config.download:
        try:
            return download(config.name, roots[-1])
        except Exception as error:  # torchvision and urllib raise many kinds; each means that there are no files
            why += f", and the download failed ({' '.join(str(error).split())[:80]}...)"
    raise DataMissing(
        f"{config.name} cannot be had: {why}. Either --data.download true, with internet; or --data.root DIR or "
        f"MNIST_ROOT=DIR, where DIR/{subfolder} holds the four .gz files (on a cluster, first on the login node: "
        f"python -m launch data --name {config.name} --root DIR); or --data.fallback true, to train on digits."
    )


def download(name: str, root: Path) -> Path:
    """Download a data set by torchvision (its mirrors, its checksums) and return its folder."""
    import torchvision.datasets

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # a firewall that drops packets would hang for minutes
    try:
        getattr(torchvision.datasets, FOLDERS[name])(str(root), download=True)
    finally:
        socket.setdefaulttimeout(timeout)
    return root / FOLDERS[name] / "raw"


def content_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def cache_file(config: DataConfig) -> Path:
    """Where the parsed tensors of this source are cached: another file, or a touched one, is another source."""
    source: list[Any] = [CACHE_SCHEMA, config.name]
    if config.name in FOLDERS:
        folder = find_folder(config)
        for path in sorted(folder.glob("*-ubyte*")):
            status = path.stat()
            source += [str(path.resolve()), status.st_size, status.st_mtime_ns]
    tag = hashlib.sha256(repr(source).encode()).hexdigest()[:16]
    return cache_dir() / f"{config.name}-{tag}.safetensors"


def load_cache(path: Path) -> tuple[dict[str, Tensor], str] | None:
    """Read cached tensors and their SHA-256; None if there are none or they are damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            promised = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return None
    found = content_sha256(tensors)
    return (tensors, found) if found == promised else None


def prepare(config: DataConfig) -> tuple[dict[str, Tensor], str]:
    """Return the parsed tensors, uint8, and their SHA-256, from the cache if it is good; write it before otherwise.

    They are mapped from its file: the ranks of a machine share one copy of the images.
    """
    if config.name == "random":
        tensors = read_random(config.random_examples)
        return tensors, content_sha256(tensors)
    with contextlib.suppress(DataMissing):  # files of the cache are only ever replaced: reading needs no lock
        if (cached := load_cache(cache_file(dataclasses.replace(config, download=False)))) is not None:
            return cached
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        (cache_dir() / f"{config.name}.lock").touch()
    except OSError as error:
        raise UserError(
            f"The cache {cache_dir()} cannot be written: {error.strerror}. Set XDG_CACHE_HOME to a place that can."
        ) from error
    with FileLock(cache_dir() / f"{config.name}.lock"):
        path = cache_file(config)
        if (cached := load_cache(path)) is not None:
            return cached
        tensors = read_digits() if config.name == "digits" else read_folder(config.name, find_folder(config))
        sha256 = content_sha256(tensors)
        write_cache(path, tensors, sha256)
        return load_cache(path) or (tensors, sha256)


def write_cache(path: Path, tensors: dict[str, Tensor], sha256: str) -> None:
    """Write parsed tensors atomically; a full disk costs the cache, not the run."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent) as place:
        temporary = Path(place) / path.name
        temporary.write_bytes(safetensors.torch.save(tensors, {"sha256": sha256}))
        os.replace(temporary, path)


def load(config: DataConfig, world: World, notify: Any = print) -> Data:
    """Return the data on this rank's device. Collective: every rank must call it.

    One process per machine looks for the files first. If they cannot be had, `data.fallback` puts digits in their place
    and says so through `notify`; without it every rank raises the same UserError.
    """
    prepared, error, missing = None, None, None
    if world.local_rank == 0:
        try:
            prepared = prepare(config)
        except UserError as found:
            error = found
    try:
        world.raise_on_all_ranks(error)
    except DataMissing as found:
        if not config.fallback:
            raise
        missing = found
    name = "digits" if missing else config.name
    error = None
    if missing or not prepared:
        try:
            prepared = prepare(DataConfig(name="digits") if missing else config)
        except UserError as found:
            error = found
    world.raise_on_all_ranks(error)
    assert prepared is not None
    tensors, sha256 = prepared
    if missing and world.is_main:
        notify(
            f"!!! {config.name} IS MISSING: TRAINING ON digits (1,797 small images of scikit-learn) INSTEAD !!!\n{missing}"
        )
    return split(config, name, tensors, sha256, world.device, is_fallback=missing is not None)


def split(
    config: DataConfig, name: str, tensors: dict[str, Tensor], sha256: str, device: torch.device, *, is_fallback: bool
) -> Data:
    """Put parsed tensors on the device; hold out the last `data.validation` training examples if asked to."""
    images, labels = tensors["train_images"], tensors["train_labels"]
    test_images, test_labels = tensors["t10k_images"], tensors["t10k_labels"]
    if config.validation:
        if config.validation >= len(labels):
            raise UserError(f"data.validation is {config.validation}, but {name} has {len(labels)} training examples.")
        (images, test_images) = images.split([len(images) - config.validation, config.validation])
        (labels, test_labels) = labels.split([len(labels) - config.validation, config.validation])
    # Integer sums are exact, so every machine derives the same two constants.
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

"""Read, check and write files of images and labels: .npz, .safetensors and IDX.

Invariant: what `read` returns can be trained on. Anything else is a UserError, one line that names the file, the array,
what it holds and what was expected. Nothing is unpickled, and a file that unpacks to more than the free memory is
refused before it is unpacked. A .safetensors file is mapped, not copied.
"""

import gzip
import io
import json
import math
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.errors import UserError, refused
from train.rundir import write_atomically

SUFFIXES = (".npz", ".safetensors")
SPLITS = ("train", "test", "validation")
NAMES = [f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")]
IDX_TYPES = {b"\x08": ">u1", b"\x09": ">i1", b"\x0b": ">i2", b"\x0c": ">i4"}
GIB = 2**30


@dataclass(frozen=True)
class Arrays:
    """Images and labels of two or three splits, and the names of the classes.

    `tensors` has train_images, train_labels, test_images, test_labels and perhaps validation_images and
    validation_labels. Images are uint8 [N,H,W] (grey) or [N,H,W,3] (RGB), labels int64 [N].
    """

    tensors: dict[str, Tensor]
    class_names: list[str]  # one per label


def check_fits(num_bytes: int, free_bytes: int, what: str, place: str) -> None:
    """Raise UserError with both sizes if something needs more bytes than are free in a place, such as "memory"."""
    if num_bytes > free_bytes:
        sizes = f"{num_bytes / GIB:,.1f} GiB and {free_bytes / GIB:,.1f} GiB of {place} are free"
        raise UserError(f"{what} needs {sizes}. Use fewer or smaller images.")


def num_bytes(path: Path) -> int:
    """Return how many bytes the arrays of a file fill once they are read. Raises UserError for other files."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no file of images. Expected a name that ends in .npz or .safetensors.")
    with refused(f"{path} cannot be read"):
        if not path.is_file():  # a pipe would block
            raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}. Expected images.")
        if not path.stat().st_size:
            raise UserError(f"{path} is empty. Write it again.")
        if path.suffix == ".safetensors":
            return path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())


def read(path: Path) -> Arrays:
    """Read and check a .npz or .safetensors file. Raises UserError.

    Images may also be [N,H,W,1], labels [N,1] and of any integer type, and val_ stands for validation_. Without
    class_names (a list of strings: JSON in the metadata of safetensors), classes have the names of their labels.
    """
    size = num_bytes(path)
    if path.suffix == ".npz":
        check_fits(size, psutil.virtual_memory().available, str(path), "memory")
    with refused(f"{path} cannot be read"):
        found, class_names = (_read_npz if path.suffix == ".npz" else _read_safetensors)(path)
    tensors = {name: to_tensor(name, array, path) for name, array in found.items()}
    if class_names is None:
        class_names = label_names(tensors)
    if not isinstance(class_names, list):
        raise UserError(f"{path}: class_names is {class_names!a:.40}, expected a list of strings.")
    arrays = Arrays(tensors, class_names)
    check(arrays, str(path))
    return arrays


def _read_npz(path: Path) -> tuple[dict[str, NDArray[Any]], Any]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = _canonical([entry.filename.removesuffix(".npy") for entry in entries], {"class_names"}, path)
        for name, entry in zip(names, entries, strict=True):
            with refused(f"{path}: {name} cannot be read"), archive.open(entry) as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                if file.read(1):  # zipfile compares the checksum at the end
                    raise ValueError("bytes follow the array")
    class_names = arrays.pop("class_names", None)
    return arrays, None if class_names is None else class_names.tolist()


def _read_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], Any]:
    arrays = {}
    with safetensors.safe_open(path, "pt") as file:
        keys = list(file.keys())
        for name, key in zip(_canonical(keys, set(), path), keys, strict=True):
            with refused(f"{path}: {name} cannot be read"):
                arrays[name] = file.get_tensor(key).numpy()
        metadata = file.metadata() or {}
    return arrays, json.loads(metadata["class_names"]) if "class_names" in metadata else None


def _canonical(names: Iterable[str], optional: set[str], path: Path) -> list[str]:
    """Return the names of arrays with val_ written out. Raises UserError unless each has its place."""
    found = [f"validation_{name[4:]}" if name.startswith("val_") else name for name in names]
    expected = NAMES if any(name.startswith("validation_") for name in found) else NAMES[:4]
    if missing := [name for name in expected if name not in found]:
        raise UserError(f"{path} lacks {', '.join(missing)}. It has {sorted(found)[:8]!a}.")
    if unknown := sorted(set(found) - {*expected, *optional}):
        raise UserError(f"{path} has unknown arrays: {unknown[:8]!a}. Expected {', '.join(NAMES)}.")
    if len(set(found)) < len(found):
        raise UserError(f"{path} has an array twice: {sorted(found)[:8]!a}. Keep one.")
    return found


def to_tensor(name: str, array: NDArray[Any], path: Path) -> Tensor:
    """Return images uint8 [N,H,W] or [N,H,W,3], or labels int64 [N]. Raises UserError for other types and shapes."""
    if name.endswith("images"):
        is_valid = array.dtype == np.uint8 and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3)))
        expected = "uint8 [N,H,W], [N,H,W,1] or [N,H,W,3]"
    else:
        is_valid = array.dtype.kind in "iu" and (array.ndim == 1 or array.shape[1:] == (1,))
        expected = "integers [N] or [N,1]"
    if not is_valid:
        raise UserError(f"{path}: {name} is {array.dtype} {list(array.shape)}, expected {expected}. Convert it.")
    if array.ndim in (2, 4) and array.shape[-1] == 1:
        array = array[..., 0]
    return torch.from_numpy(np.ascontiguousarray(array, np.uint8 if name.endswith("images") else np.int64))


def label_names(tensors: dict[str, Tensor], first: int = 0) -> list[str]:
    """Return the labels from `first` to the largest one, as names of classes."""
    labels = torch.cat([tensor for name, tensor in tensors.items() if name.endswith("labels")])
    # Each class needs a training example, so a stray label does not add more names than there are examples.
    num_classes = min(int(labels.max()) + 1 - first, len(tensors["train_labels"])) if len(labels) else 0
    return [str(first + label) for label in range(num_classes)]


def check(arrays: Arrays, source: str) -> None:
    """Raise UserError, naming the source, unless the arrays can be trained on: same sizes, all labels and classes."""
    tensors, num_classes = arrays.tensors, len(arrays.class_names)
    shape = list(tensors["train_images"].shape[1:])
    for split in (split for split in SPLITS if f"{split}_images" in tensors):
        images, labels = tensors[f"{split}_images"], tensors[f"{split}_labels"]
        if list(images.shape[1:]) != shape:
            found = f"images of {list(images.shape[1:])}, expected {shape} as in train_images"
            raise UserError(f"{source}: {split}_images has {found}. Give all images one size and one colour mode.")
        if len(images) != len(labels):
            lengths = f"{len(images)} images and {split}_labels {len(labels)} labels"
            raise UserError(f"{source}: {split}_images has {lengths}. Expected a label for each image.")
        if not images.numel():
            raise UserError(f"{source}: {split}_images is empty: {list(images.shape)}. Expected images.")
        low, high = (int(edge) for edge in labels.aminmax())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise UserError(f"{source}: {split}_labels has label {wrong}, expected 0 to {max(num_classes, 2) - 1}.")
        counts = torch.bincount(labels, minlength=num_classes)
        if not counts.all():
            label = int(counts.argmin())
            lack = f"class {label} ({arrays.class_names[label]!a:.40}) has no example in {split}_labels"
            raise UserError(f"{source}: {lack}. Every class needs one in each split.")
    _check_class_names(arrays.class_names, source)


def _check_class_names(names: Any, source: str) -> None:
    for name in names:
        if not (isinstance(name, str) and name.strip() and name.isprintable()):
            raise UserError(f"{source}: class_names has {name!a:.40}, expected printable, non-empty strings.")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{source}: class_names has {repeated[0]!a:.40} twice. Expected one name per class.")
    if len(names) < 2:
        raise UserError(f"{source} has {len(names)} class, expected at least 2.")


def write(path: Path, arrays: Arrays) -> None:
    """Write checked arrays as .safetensors, whole or not at all. Equal arrays give equal bytes. Raises UserError."""
    check(arrays, str(path))
    with refused(f"{path} cannot be written"):
        metadata = {"class_names": json.dumps(arrays.class_names)}
        write_atomically(path, safetensors.torch.save(arrays.tensors, metadata))


def read_idx(content: bytes, name: str) -> NDArray[Any]:
    """Parse an array in LeCun's IDX format, packed with gzip or not. Raises UserError, naming it.

    The array has the type of the file, an integer of 1, 2 or 4 bytes, in the machine's byte order.
    """
    is_packed = content[:2] == b"\x1f\x8b"
    with refused(f"{name} is no whole IDX file"):
        file: Any = gzip.GzipFile(fileobj=io.BytesIO(content)) if is_packed else io.BytesIO(content)
        header = file.read(4)
        if header[:2] != b"\0\0" or header[2:3] not in IDX_TYPES or len(header) < 4:
            raise ValueError(f"it begins with {list(header)}, expected [0, 0, 8, 3] or [0, 0, 8, 1] or alike")
        dtype = np.dtype(IDX_TYPES[header[2:3]])
        shape = np.frombuffer(file.read(4 * header[3]), ">u4").tolist()
        size = math.prod(shape) * dtype.itemsize
        check_fits(size, psutil.virtual_memory().available, name, "memory")
        body = file.read(size + 1)
        if len(shape) != header[3] or len(body) != size:
            more = "more" if len(body) > size else f"{len(body):,}"
            raise ValueError(f"it has {more} bytes after its header, expected {size:,} for {shape}")
        return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))

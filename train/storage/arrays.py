"""Read, check and write files of images and labels: .npz, .safetensors and IDX.

Invariant: what `read` returns can be trained on. Anything else is a UserError, one line that names the file, the array,
what it holds and what was expected. Nothing is unpickled, and a file that unpacks to more than the free memory is
refused before it is unpacked. A .safetensors file is mapped, not copied.
"""

import gzip
import io
import json
import math
import re
import struct
import zipfile
from collections import Counter
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

SPLITS = ("train", "test", "validation")
NAMES = [f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")]
IDX_TYPES = {b"\0\0\x08": ">u1", b"\0\0\x09": ">i1", b"\0\0\x0b": ">i2", b"\0\0\x0c": ">i4"}


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
        sizes = f"{num_bytes / 2**30:,.1f} GiB and {free_bytes / 2**30:,.1f} GiB of {place} are free"
        raise UserError(f"{what} needs {sizes}. Use fewer or smaller images.")


def num_bytes(path: Path) -> int:
    """Return how many bytes the arrays of a file fill once they are read. Raises UserError for other files."""
    with refused(f"{path} cannot be read"):
        if not path.is_file():  # a pipe would block
            raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}. Expected images.")
        if path.suffix == ".safetensors":
            return path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())


def read(path: Path) -> Arrays:
    """Read and check a .npz or .safetensors file. Raises UserError.

    Images may also be [N,H,W,1], labels [N,1] and of any integers, and val_ stands for validation_. class_names is a
    list of strings, in the metadata of safetensors as JSON. Without it, classes have the names of their labels.
    """
    found, num_needed, is_npz = {}, num_bytes(path), path.suffix == ".npz"
    if is_npz:
        check_fits(num_needed, psutil.virtual_memory().available, str(path), "memory")
    file: Any
    with (
        refused(f"{path} cannot be read"),
        np.load(path, allow_pickle=False) if is_npz else safetensors.safe_open(path, "pt") as file,
    ):
        keys = list(file.keys())
        names = [re.sub("^val_", "validation_", key) for key in keys]
        for name, key in zip(names, keys, strict=True):
            with refused(f"{path}: {name} cannot be read"):
                found[name] = np.asarray(file[key] if is_npz else file.get_tensor(key))
        metadata = {} if is_npz else file.metadata() or {}
        class_names = json.loads(metadata.get("class_names", "null"))
    if "class_names" in found:
        class_names = found.pop("class_names").tolist()
    expected = NAMES if any(name.startswith("validation_") for name in names) else NAMES[:4]
    if sorted(name for name in names if name != "class_names") != sorted(expected):
        raise UserError(
            f"{path} has the arrays {sorted(names)!a:.200}, expected {', '.join(expected)}. Use these names."
        )
    tensors = {name: to_tensor(name, array, path) for name, array in found.items()}
    if class_names is None:
        class_names = [str(label) for label in tensors["train_labels"].unique().tolist()]
    arrays = Arrays(tensors, class_names)
    check(arrays, str(path))
    return arrays


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


def check(arrays: Arrays, source: str) -> None:
    """Raise UserError, naming the source, unless the arrays can be trained on: same sizes, all labels and classes."""
    tensors, names = arrays.tensors, arrays.class_names
    if not isinstance(names, list) or len(names) < 2:
        raise UserError(f"{source}: the classes are {names!a:.40}, expected a list of at least 2.")
    if wrong := [name for name in names if not (isinstance(name, str) and name.strip() and name.isprintable())]:
        raise UserError(f"{source}: class_names has {wrong[0]!a:.40}, expected printable, non-empty strings.")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{source}: class_names has {repeated[0]!a:.40} twice. Expected one name per class.")
    classes = set(range(len(names)))
    shape = list(tensors["train_images"].shape[1:])
    for split in (split for split in SPLITS if f"{split}_images" in tensors):
        images, labels = tensors[f"{split}_images"], tensors[f"{split}_labels"]
        if list(images.shape[1:]) != shape or len(images) != len(labels) or not images.numel():
            found = f"{split} has images {list(images.shape)} and labels {list(labels.shape)}"
            expected = f"expected at least one image, all of {shape} as in train, and a label for each"
            raise UserError(f"{source}: {found}, {expected}.")
        present = set(labels.unique().tolist())
        if stray := present - classes:
            raise UserError(f"{source}: {split}_labels has label {min(stray)}, expected 0 to {len(names) - 1}.")
        if missing := classes - present:
            lack = f"class {min(missing)} ({names[min(missing)]!a:.40}) has no example in {split}_labels"
            raise UserError(f"{source}: {lack}. Every class needs one in each split.")


def write(path: Path, arrays: Arrays) -> None:
    """Write checked arrays as .safetensors, whole or not at all. Equal arrays give equal bytes. Raises UserError."""
    with refused(f"{path} cannot be written"):
        metadata = {"class_names": json.dumps(arrays.class_names)}
        write_atomically(path, safetensors.torch.save(arrays.tensors, metadata))


def read_idx(content: bytes, name: str) -> NDArray[Any]:
    """Parse an array in LeCun's IDX format, packed with gzip or not, of any integers. Raises UserError, naming it."""
    with refused(f"{name} is no whole IDX file"):
        file: Any = io.BytesIO(content)
        if content[:2] == b"\x1f\x8b":
            file = gzip.GzipFile(fileobj=file)
        try:
            header = file.read(4)
            if not header:
                raise ValueError("it is empty")
            if header.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
                raise ValueError("it is a web page")
            if header[:3] not in IDX_TYPES:
                raise ValueError(f"it begins with {list(header)}, expected [0, 0, 8, 3] or [0, 0, 8, 1] or alike")
            dtype = np.dtype(IDX_TYPES[header[:3]])
            shape = struct.unpack(f">{header[3]}I", file.read(4 * header[3]))
            size = math.prod(shape) * dtype.itemsize
            check_fits(size, psutil.virtual_memory().available, name, "memory")
            body = file.read(size + 1)
        except (EOFError, IndexError, struct.error):
            raise ValueError("it is cut off") from None
        if len(body) != size:
            raise ValueError(f"it is {'cut off' if len(body) < size else 'too long'}, expected {size:,} bytes of data")
        return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))

"""A file of images is read whole and checked, or refused in one line that names the file and what is wrong with it."""

import contextlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from train.errors import UserError
from train.storage import arrays
from train.storage.arrays import Arrays

Fields = dict[str, Any]


def fields(**changes: Any) -> Fields:
    """Return the arrays of a good file: 12 training and 6 test images of 5 x 4 pixels in 3 classes."""
    generator = np.random.default_rng(0)
    found: Fields = {}
    for split, count in (("train", 12), ("test", 6)):
        found[f"{split}_images"] = generator.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        found[f"{split}_labels"] = np.arange(count) % 3
    return {name: array for name, array in {**found, **changes}.items() if array is not None}


def npz(**changes: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **fields(**changes))
    return buffer.getvalue()


def tensors(metadata: dict[str, str] | None = None, **changes: Any) -> bytes:
    found = {name: torch.as_tensor(array) for name, array in fields(**changes).items()}
    return safetensors.torch.save(found, metadata)


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def images(*shape: int) -> NDArray[np.uint8]:
    return np.ones(shape, np.uint8)


def labels_with(index: int, label: Any, dtype: Any = np.int64) -> NDArray[Any]:
    found = (np.arange(12) % 3).astype(dtype)
    found[index] = label
    return found


def packed(method: int) -> bytes:
    """Return a good file whose arrays are packed with a method of zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, array in fields().items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(array))
    return buffer.getvalue()


def with_entry(name: str, content: bytes) -> bytes:
    """Return a file with one array replaced by other bytes, or with one more entry."""
    buffer = io.BytesIO()
    good = {f"{name}.npy": array for name, array in fields().items()}
    good.pop(name, None)
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry, array in good.items():
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, np.asarray(array))
        archive.writestr(name, content)
    return buffer.getvalue()


def npy(header: dict[str, Any], content: bytes) -> bytes:
    text = repr(header).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def encrypted() -> bytes:
    content = bytearray(npz())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(magic)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(magic, at + 1)
    return bytes(content)


def flipped() -> bytes:
    content = npz()
    at = content.find(fields()["train_images"].tobytes())
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


BYTES = {"descr": "|u1", "fortran_order": False}
OBJECTS = np.array([{"a": 1}] * 12, dtype=object)
# case -> content of x.npz, and what the one line must contain
BAD_NPZ: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not a zip file"),
    "text": (lambda: b"<html>404 Not Found</html>", "not a zip file"),
    "npy": (lambda: npy({**BYTES, "shape": (3,)}, b"abc"), "not a zip file"),
    "pickle": (lambda: b"\x80\x04\x95\x00.", "not a zip file"),
    "half": (lambda: npz()[: len(npz()) // 2], "not a zip file"),
    "one byte short": (lambda: npz()[:-1], ""),
    "flipped bit": (flipped, "train_images cannot be read: Bad CRC-32"),
    "encrypted": (encrypted, "is encrypted"),
    "zip of nothing": (lambda: b"PK\x05\x06" + bytes(18), "has the arrays [], expected train_images, train_labels"),
    "pickled images": (lambda: npz(train_images=OBJECTS), "train_images cannot be read: Object arrays"),
    "pickled names": (lambda: npz(class_names=OBJECTS), "class_names cannot be read: Object arrays"),
    "no array": (lambda: with_entry("train_images.npy", b"no array"), "train_images is |S8 [], expected uint8"),
    "short array": (
        lambda: with_entry("train_images.npy", npy({**BYTES, "shape": (10**10, 5, 4)}, b"")),
        "train_images cannot be read",
    ),
    "long array": (
        lambda: with_entry("test_labels.npy", npy({"descr": "<i8", "fortran_order": False, "shape": (1,)}, bytes(9))),
        "test has images [6, 5, 4] and labels [1]",
    ),
    "float images": (
        lambda: npz(train_images=np.ones((12, 5, 4))),
        "train_images is float64 [12, 5, 4], expected uint8 [N,H,W], [N,H,W,1] or [N,H,W,3]",
    ),
    "NaN": (lambda: npz(test_images=np.full((6, 5, 4), np.nan, np.float32)), "test_images is float32 [6, 5, 4]"),
    "float labels": (lambda: npz(train_labels=labels_with(0, np.nan, float)), "train_labels is float64 [12], expected"),
    "labels of text": (lambda: npz(test_labels=np.array(["a"] * 6)), "test_labels is <U1 [6], expected integers"),
    "bool labels": (lambda: npz(test_labels=np.ones(6, bool)), "test_labels is bool [6], expected integers"),
    "records": (lambda: npz(train_images=np.zeros(12, [("a", "u1")])), "train_images is [('a', 'u1')] [12]"),
    "one-hot labels": (lambda: npz(train_labels=np.ones((12, 3), int)), "train_labels is int64 [12, 3], expected"),
    "flat images": (lambda: npz(train_images=images(12, 20)), "train_images is uint8 [12, 20]"),
    "two channels": (lambda: npz(train_images=images(12, 5, 4, 2)), "train_images is uint8 [12, 5, 4, 2]"),
    "four channels": (lambda: npz(train_images=images(12, 5, 4, 4)), "train_images is uint8 [12, 5, 4, 4]"),
    "channels first": (lambda: npz(train_images=images(12, 3, 5, 4)), "train_images is uint8 [12, 3, 5, 4]"),
    "grey test": (
        lambda: npz(train_images=images(12, 5, 4, 3)),
        "test has images [6, 5, 4] and labels [6], expected at least one image, all of [5, 4, 3] as in train",
    ),
    "other size": (lambda: npz(test_images=images(6, 4, 5)), "test has images [6, 4, 5] and"),
    "no test images": (lambda: npz(test_images=None), "has the arrays ['test_labels', 'train_images', "),
    "no labels": (lambda: npz(train_labels=None, test_labels=None), "has the arrays ['test_images', 'train_images'],"),
    "half a validation split": (lambda: npz(val_images=images(6, 5, 4)), "validation_images, validation_labels. Use"),
    "slip": (lambda: npz(trian_images=images(12, 5, 4)), "'trian_images'], expected train_images, train_labels, "),
    "other entry": (lambda: with_entry("read\nme.txt", b"hello"), r"has the arrays ['read\nme.txt', 'test_images'"),
    "both names": (
        lambda: npz(**dict.fromkeys(("val_images", "validation_images"), images(3, 5, 4)), val_labels=np.arange(3)),
        "'validation_images', 'validation_images'",
    ),
    "fewer labels": (lambda: npz(train_labels=np.arange(11) % 3), "train has images [12, 5, 4] and labels [11]"),
    "no examples": (
        lambda: npz(test_images=images(0, 5, 4), test_labels=np.arange(0)),
        "test has images [0, 5, 4] and labels [0], expected at least one",
    ),
    "no pixels": (lambda: npz(train_images=images(12, 0, 4), test_images=images(6, 0, 4)), "has images [12, 0, 4]"),
    "negative label": (lambda: npz(train_labels=labels_with(5, -1)), "train_labels has label -1, expected 0 to 3"),
    "label without a class": (
        lambda: npz(class_names=np.array(["a", "b"])),
        "train_labels has label 2, expected 0 to 1",
    ),
    "stray label": (lambda: npz(train_labels=labels_with(5, 10**12)), "train_labels has label 1000000000000"),
    "huge label": (lambda: npz(train_labels=labels_with(5, 2**64 - 1, np.uint64)), "train_labels has label -1"),
    "gap": (lambda: npz(train_labels=labels_with(5, 4)), "train_labels has label 4, expected 0 to 3"),
    "class without a test": (
        lambda: npz(test_labels=np.arange(6) % 2, class_names=np.array(["ant", "bee", "cat"])),
        "class 2 ('cat') has no example in test_labels",
    ),
    "one class": (
        lambda: npz(train_labels=np.zeros(12, int), test_labels=np.zeros(6, int)),
        "the classes are ['0'], expected a list of at least 2",
    ),
    "name twice": (lambda: npz(class_names=np.array(["a", "b", "a"])), "class_names has 'a' twice"),
    "empty name": (lambda: npz(class_names=np.array(["a", " ", "c"])), "class_names has ' ', expected printable"),
    "control character": (lambda: npz(class_names=np.array(["a", "\x1b[2J", "c"])), r"class_names has '\x1b[2J'"),
    "numbers as names": (lambda: npz(class_names=np.arange(3)), "class_names has 0, expected printable"),
    "one name": (lambda: npz(class_names=np.array("a")), "the classes are 'a', expected a list"),
}
BAD_SAFETENSORS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "cannot be read"),
    "text": (lambda: b"<html>404 Not Found</html>", "cannot be read"),
    "npz": (npz, "cannot be read"),
    "half": (lambda: tensors()[: len(tensors()) // 2], "cannot be read"),
    "long": (lambda: tensors() + b"\0", "cannot be read"),
    "huge header": (lambda: b"\xff" * 7 + b"\x7f" + b"{}", "cannot be read"),
    "bfloat16": (lambda: tensors(train_images=torch.ones(12, 5, 4, dtype=torch.bfloat16)), "train_images cannot be"),
    "float images": (lambda: tensors(train_images=torch.ones(12, 5, 4)), "train_images is float32 [12, 5, 4]"),
    "names as a tensor": (lambda: tensors(class_names=torch.ones(3)), "class_names has 1.0, expected printable"),
    "names not JSON": (lambda: tensors({"class_names": "a, b, c"}), "cannot be read"),
    "names in a dict": (lambda: tensors({"class_names": '{"a": 0}'}), "the classes are {'a': 0}, expected a list"),
    "deep names": (lambda: tensors({"class_names": "[" * 100_000}), "cannot be read"),
    "numbers as names": (lambda: tensors({"class_names": "[1, 2, 3]"}), "class_names has 1, expected printable"),
}
BAD = {("x.npz", case): rest for case, rest in BAD_NPZ.items()}
BAD |= {("x.safetensors", case): rest for case, rest in BAD_SAFETENSORS.items()}


def refusal(path: Path) -> str:
    """Read a file that must be refused, and return the message without the file's name."""
    with pytest.raises(UserError) as error:
        arrays.read(path)
    assert str(error.value).startswith(str(path))
    assert str(error.value).isprintable()
    return str(error.value)[len(str(path)) :]


@pytest.mark.parametrize(("name", "case"), BAD)
def test_malformed_file_is_refused_in_one_line(name: str, case: str, tmp_path: Path) -> None:
    make, words = BAD[name, case]
    message = refusal(saved(tmp_path / name, make()))
    assert words in message
    assert len(message) < 400


@pytest.mark.parametrize("kind", ["absent", "folder", "pipe", "loop", "other name", "long name"])
def test_what_is_no_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "other name":
        path = saved(tmp_path / "x.zip", npz())
    elif kind == "long name":
        path = tmp_path / f"{'x' * 300}.npz"
    assert "\n" not in refusal(path)


def test_zip_bomb_is_refused_with_both_sizes_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "x.npz", npz())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(200_000_000))
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=100_000_000))
    monkeypatch.setattr(np.lib.format, "read_array", None)
    assert refusal(path) == " needs 0.2 GiB and 0.1 GiB of memory are free. Use fewer or smaller images."
    assert arrays.num_bytes(path) > 200_000_000


def test_check_fits_compares_bytes() -> None:
    arrays.check_fits(100, 100, "x", "memory")
    with pytest.raises(UserError, match=r"^x needs 120\.0 GiB and 20\.1 GiB of GPU memory are free"):
        arrays.check_fits(120 * 2**30, round(20.1 * 2**30), "x", "GPU memory")


def test_read_returns_the_arrays_of_either_format(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat"]
    paths = [
        saved(tmp_path / "x.npz", npz(class_names=np.array(names))),
        saved(tmp_path / "x.safetensors", tensors({"class_names": json.dumps(names)})),
    ]
    for path in paths:
        found = arrays.read(path)
        assert found.class_names == names
        assert set(found.tensors) == set(fields())
        for name, array in fields().items():
            assert np.array_equal(found.tensors[name].numpy(), array)
            assert found.tensors[name].dtype == (torch.uint8 if "images" in name else torch.int64)


VARIANTS: dict[str, Callable[[], bytes]] = {
    "deflated": lambda: packed(zipfile.ZIP_DEFLATED),
    "bzip2": lambda: packed(zipfile.ZIP_BZIP2),
    "one channel": lambda: npz(
        **{f"{split}_images": fields()[f"{split}_images"][..., None] for split in ("train", "test")}
    ),
    "columns": lambda: npz(
        train_labels=fields()["train_labels"][:, None], test_labels=fields()["test_labels"][:, None]
    ),
    "big-endian labels": lambda: npz(train_labels=fields()["train_labels"].astype(">i4")),
    "small labels": lambda: npz(train_labels=fields()["train_labels"].astype(np.uint8)),
    "Fortran order": lambda: npz(train_images=np.asfortranarray(fields()["train_images"])),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_read_returns_one_form_of_every_variant(variant: str, tmp_path: Path) -> None:
    found = arrays.read(saved(tmp_path / "x.npz", VARIANTS[variant]()))
    assert found.class_names == ["0", "1", "2"]
    for name, array in fields().items():
        assert found.tensors[name].is_contiguous()
        assert found.tensors[name].dtype == (torch.uint8 if "images" in name else torch.int64)
        assert np.array_equal(found.tensors[name].numpy(), array)


@pytest.mark.parametrize("prefix", ["val", "validation"])
def test_read_returns_the_validation_split_under_one_name(prefix: str, tmp_path: Path) -> None:
    extra = {f"{prefix}_images": images(3, 5, 4), f"{prefix}_labels": np.arange(3)}
    link = tmp_path / "link.npz"
    link.symlink_to(saved(tmp_path / "x.npz", npz(**extra)))
    assert list(arrays.read(link).tensors["validation_labels"]) == [0, 1, 2]


def test_write_is_read_back_and_depends_on_the_content_only(tmp_path: Path) -> None:
    found = arrays.read(saved(tmp_path / "x.npz", npz(class_names=np.array(["a", "\xe9", "\u304b"]))))
    turned = Arrays(dict(reversed(found.tensors.items())), found.class_names)
    for name, content in (("a", found), ("b", turned)):
        arrays.write(tmp_path / f"{name}.safetensors", content)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = arrays.read(tmp_path / "a.safetensors")
    assert again.class_names == found.class_names
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in found.tensors.items())


def test_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = arrays.read(saved(tmp_path / "x.npz", npz()))

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
        arrays.write(tmp_path / "y.safetensors", found)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_damaged_byte_is_refused_or_changes_no_shape(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    name, good = data.draw(st.sampled_from([("x.npz", npz()), ("x.safetensors", tensors())]))
    at = data.draw(st.integers(0, len(good) - 1))
    path = tmp_path_factory.getbasetemp() / name
    saved(path, good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :])
    with contextlib.suppress(UserError):
        assert arrays.read(path).tensors["train_images"].shape == (12, 5, 4)

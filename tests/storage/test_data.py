"""A run trains on verified data only, and distinguishes missing files from damaged ones."""

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from train.config import DataConfig
from train.errors import UserError
from train.storage import built_in, data
from train.world.world import World

RAW = Path("MNIST") / "raw"
DIGITS_SHA256, RANDOM_SHA256 = "59f5081b90bc0ada", "d0486dca0ea943e4"
COUNTS = {"train": 12, "t10k": 6}
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def idx(array: np.ndarray) -> bytes:
    """Encode an array of bytes in IDX format."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def contents() -> dict[str, bytes]:
    """Return the content of the four files of a tiny data set."""
    generator = np.random.default_rng(0)
    files = {}
    for name in built_in.IDX_FILES:
        count = COUNTS[name.split("-")[0]]
        files[name] = idx(generator.integers(0, 256, (count, 28, 28)) if "images" in name else np.arange(count) % 10)
    return files


def change(content: bytes, at: int, value: int) -> bytes:
    return content[:at] + bytes([value]) + content[at + 1 :]


GOOD = contents()
PACKED = {name: gzip.compress(content, mtime=0) for name, content in GOOD.items()}


class Source:
    """A root with a tiny data set whose contents' checksums replace MNIST's."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.folder = root / RAW
        self.folder.mkdir(parents=True)
        for name, content in PACKED.items():
            (self.folder / name).write_bytes(content)
        patch.setattr(built_in, "MNIST_MD5", [hashlib.md5(content).hexdigest() for content in GOOD.values()])

    @property
    def config(self) -> DataConfig:
        return DataConfig(root=str(self.root), download=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache directory for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lockstep"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Source:
    return Source(tmp_path / "root", monkeypatch)


# what a file may hold instead of its published content, and words of the refusal
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no whole IDX file: it is empty"),
    "nothing, packed": (gzip.compress(b""), "is no whole IDX file: it is empty"),
    "web page": (b"\n<html>404 Not Found</html>", "is no whole IDX file: it is a web page"),
    "web page, packed": (gzip.compress(b"<!DOCTYPE html>"), "is no whole IDX file: it is a web page"),
    "text": (b"version https://git-lfs", "is no whole IDX file: it begins with [118, 101"),
    "half": (PACKED[IMAGES][: len(PACKED[IMAGES]) // 2], "is no whole IDX file: it is cut off"),
    "one byte short": (PACKED[IMAGES][:-1], "is no whole IDX file: it is cut off"),
    "half, not packed": (GOOD[IMAGES][:1000], "is no whole IDX file: it is cut off"),
    "one byte long, not packed": (GOOD[IMAGES] + b"\0", "is no whole IDX file: it is too long"),
    "other file": (PACKED[LABELS], f"holds {LABELS} of mnist, expected {IMAGES} of mnist"),
    "other data": (gzip.compress(change(GOOD[IMAGES], 1000, GOOD[IMAGES][1000] ^ 1)), "holds other data"),
    "transposed": (idx(np.arange(12 * 28 * 28).reshape(12, 28, 28).transpose(0, 2, 1) % 251), "holds other data"),
    **{f"flipped bit in byte {at}": (change(PACKED[IMAGES], at, PACKED[IMAGES][at] ^ 1), "") for at in (0, 100, -1)},
}


def refusal(source: Source, world: World, *, fallback: bool = True) -> str:
    """Load data that must be refused without falling back to digits, and return the message."""
    printed: list[str] = []
    config = DataConfig(root=str(source.root), download=False, fallback=fallback)
    with pytest.raises(UserError) as error:
        data.load(config, world, printed.append)
    assert not isinstance(error.value, built_in.DataMissing)
    assert printed == []
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", BAD)
def test_load_refuses_a_file_with_another_content(case: str, source: Source, world: World) -> None:
    path, (content, words) = source.folder / IMAGES, BAD[case]
    path.write_bytes(content)
    message = refusal(source, world)
    assert message.startswith(f"{path} {words}")
    assert "Delete it and get it again." in message or "Put the published file there" in message


def test_load_refuses_a_directory_in_place_of_a_file(source: Source, world: World) -> None:
    (source.folder / IMAGES).unlink()
    (source.folder / IMAGES).mkdir()
    assert IMAGES in refusal(source, world)


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse terabyte"])
def test_load_refuses_a_file_whose_reading_would_never_end(kind: str, source: Source, world: World) -> None:
    path = source.folder / IMAGES
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 10**12)
    assert f"{path} is not a file of at most 200,000,000 bytes" in refusal(source, world)


@pytest.mark.parametrize("layout", ["torchvision", "flat", "environment"])
def test_load_reads_every_layout(layout: str, source: Source, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = source.config
    if layout == "flat":
        config = DataConfig(root=str(source.folder), download=False)
    if layout == "environment":
        monkeypatch.setenv("MNIST_ROOT", str(source.root))
        config = DataConfig(download=False)
    before = sorted(str(path) for path in source.root.rglob("*"))
    found = data.load(config, world)
    assert found.train.images.shape == (12, 1, 28, 28)
    assert found.train.images.dtype == torch.uint8
    assert found.train.images.numpy().tobytes() == GOOD[IMAGES][16:]
    assert found.test.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.test.labels.dtype == torch.int64
    assert (found.name, found.eval_split, found.is_fallback, len(found.train)) == ("mnist", "test", False, 12)
    pixels = found.train.images.double()
    expected = (float(pixels.mean()), float(pixels.std(unbiased=False)))
    assert (*found.mean, *found.std) == pytest.approx(expected, rel=1e-12)
    assert sorted(str(path) for path in source.root.rglob("*")) == before


def test_load_falls_back_to_digits_only_if_files_are_missing(tmp_path: Path, world: World) -> None:
    printed: list[str] = []
    found = data.load(DataConfig(root=str(tmp_path), download=False, fallback=True), world, printed.append)
    assert (found.name, found.is_fallback, found.summary()["is_fallback"]) == ("digits", True, True)
    assert len(printed) == 1
    assert printed[0].startswith("warning: training on digits")
    assert str(tmp_path) in printed[0]
    with pytest.raises(built_in.DataMissing, match="mnist not found"):
        data.load(DataConfig(root=str(tmp_path), download=False), world)


@pytest.mark.parametrize("missing", built_in.IDX_FILES)
def test_load_names_the_file_that_is_missing(missing: str, source: Source, world: World) -> None:
    (source.folder / missing).unlink()
    with pytest.raises(built_in.DataMissing) as error:
        data.load(source.config, world)
    assert missing in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_load_names_the_ways_to_get_files_when_the_download_fails(
    name: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(published: built_in.Published, root: Path) -> Path:
        assert root == tmp_path
        raise RuntimeError("Error downloading:\n<urlopen error>")

    monkeypatch.setattr(built_in, "download", fail)
    with pytest.raises(built_in.DataMissing) as error:
        data.load(DataConfig(name=name, root=str(tmp_path)), world)
    words = (
        name,
        "Error downloading: <urlopen error>",  # without a reason in it
        "--data.root",
        "MNIST_ROOT",
        "--data.fallback",
        built_in.PUBLISHED[name].folder,
    )
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_a_download_that_fails_after_its_last_file_is_missing_data(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(published: built_in.Published, root: Path) -> Path:
        folder = root / published.folder
        folder.mkdir(parents=True)
        for file in built_in.IDX_FILES:
            (folder / file).touch()
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(built_in, "download", fail)
    with pytest.raises(built_in.DataMissing, match=r"downloading failed.* File not found or corrupted"):
        data.load(DataConfig(root=str(tmp_path)), world)


def test_digits_split_is_fixed_and_disjoint(world: World) -> None:
    found = data.load(DataConfig(name="digits"), world)
    assert (len(found.train), len(found.test)) == (1438, 359)
    rows = [{image.numpy().tobytes() for image in split.images} for split in (found.train, found.test)]
    assert rows[0].isdisjoint(rows[1])
    for split in (found.train, found.test):
        counts = torch.bincount(split.labels, minlength=10)
        assert counts.min() > 0.05 * len(split)
    assert found.sha256 == data.load(DataConfig(name="digits"), world).sha256
    assert found.sha256.startswith(DIGITS_SHA256)


def test_random_is_always_the_same_and_has_the_requested_size(world: World) -> None:
    first, again = (data.load(DataConfig(name="random", random_examples=60), world) for _ in range(2))
    assert (len(first.train), len(first.test)) == (60, 10)
    assert first.sha256 == again.sha256
    assert first.sha256.startswith(RANDOM_SHA256)


def test_validation_holds_out_the_last_training_examples(world: World) -> None:
    whole = data.load(DataConfig(name="random", random_examples=60), world)
    held = data.load(DataConfig(name="random", random_examples=60, validation=20), world)
    assert (held.eval_split, len(held.train), len(held.test)) == ("validation", 40, 20)
    assert torch.equal(torch.cat((held.train.images, held.test.images)), whole.train.images)
    assert torch.equal(held.test.labels, whole.train.labels[40:])
    assert held.sha256 == whole.sha256
    assert held.summary()["num_validation_examples"] == 20
    with pytest.raises(UserError, match=r"data\.validation is 60"):
        data.load(DataConfig(name="random", random_examples=60, validation=60), world)

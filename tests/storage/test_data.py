"""train.storage.data: a run trains on verified data only, and tells missing files from damaged ones."""

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from train.config import DataConfig
from train.errors import UserError
from train.storage import data
from train.world.world import World

RAW = Path("MNIST") / "raw"
DIGITS_SHA256, RANDOM_SHA256 = "ae5c80420f448c86", "4dbec3ca505a9782"
COUNTS = {"train": 12, "t10k": 6}
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    """Encode an array of bytes in IDX format."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def contents() -> dict[str, bytes]:
    """Return the four files of a tiny data set, unpacked."""
    generator = np.random.default_rng(0)
    files = {}
    for name in data.FILES:
        count = COUNTS[name.split("-")[0]]
        files[name] = idx(generator.integers(0, 256, (count, 28, 28)) if "images" in name else np.arange(count) % 10)
    return files


class Source:
    """A root with a tiny data set whose checksums replace MNIST's."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        import torchvision.datasets

        self.root, self.patch, self.mnist = root, patch, torchvision.datasets.MNIST
        self.folder = root / RAW
        self.folder.mkdir(parents=True)
        for name, content in contents().items():
            self.put(name, gzip.compress(content, mtime=0), packed=True)
        patch.setattr(data, "COUNTS", COUNTS)
        self.trust()

    def put(self, name: str, content: bytes, *, packed: bool) -> None:
        """Replace one file, packed or unpacked."""
        for path in (self.folder / name, self.folder / f"{name}.gz"):
            path.unlink(missing_ok=True)
        (self.folder / (f"{name}.gz" if packed else name)).write_bytes(content)

    def trust(self) -> None:
        """Expect the checksums of the present files."""
        files = {f"{name}.gz": self.folder / f"{name}.gz" for name in data.FILES}
        sums = [
            (name, hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else "0") for name, path in files.items()
        ]
        self.patch.setattr(self.mnist, "resources", sums)

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


def change(content: bytes, at: int, value: int) -> bytes:
    return content[:at] + bytes([value]) + content[at + 1 :]


GOOD = contents()
# {case: (file, its unpacked content, words of the message)}
BAD_IDX: dict[str, tuple[str, bytes, list[str]]] = {
    "empty": (IMAGES, b"", ["nothing", "000008"]),
    "one_byte": (IMAGES, b"\0", ["00", "000008"]),
    "three_bytes": (LABELS, b"\0\0\x08", ["000008"]),
    "text": (IMAGES, b"<html>404 Not Found</html>", ["3c68746d", "000008"]),
    "first_byte": (IMAGES, change(GOOD[IMAGES], 0, 1), ["01000803", "000008"]),
    "second_byte": (LABELS, change(GOOD[LABELS], 1, 9), ["00090801", "000008"]),
    "floats": (IMAGES, change(GOOD[IMAGES], 2, 0x0D), ["00000d03", "000008"]),
    "no_dimension": (IMAGES, change(GOOD[IMAGES], 3, 0), ["00000800"]),
    "four_dimensions": (IMAGES, change(GOOD[IMAGES], 3, 4), ["00000804"]),
    "255_dimensions": (LABELS, change(GOOD[LABELS], 3, 255), ["000008ff"]),
    "two_dimensions": (IMAGES, change(GOOD[IMAGES], 3, 2), [str(len(GOOD[IMAGES])), "(12, 28)"]),
    "header_only_magic": (LABELS, GOOD[LABELS][:4], ["4 bytes", "expected"]),
    "header_cut": (IMAGES, GOOD[IMAGES][:10], ["10 bytes", "expected"]),
    "no_data": (IMAGES, GOOD[IMAGES][:16], ["16 bytes", "(12, 28, 28)", "expected 9424"]),
    "one_byte_short": (IMAGES, GOOD[IMAGES][:-1], ["9423 bytes", "expected 9424"]),
    "one_byte_long": (LABELS, GOOD[LABELS] + b"\0", ["21 bytes", "expected 20"]),
    "half": (IMAGES, GOOD[IMAGES][: len(GOOD[IMAGES]) // 2], ["expected 9424"]),
    "twice": (LABELS, GOOD[LABELS] * 2, ["40 bytes", "expected 20"]),
    "huge_header": (IMAGES, GOOD[IMAGES][:4] + b"\xff" * 12 + GOOD[IMAGES][16:], ["9424 bytes", "expected"]),
    "overflowing_header": (IMAGES, b"\0\0\x08\x03" + b"\x80\0\0\0" * 2 + b"\0\0\0\x04", ["16 bytes", "expected"]),
    "little_endian": (LABELS, b"\0\0\x08\x01\x0c\0\0\0" + GOOD[LABELS][8:], ["(201326592,)", "expected"]),
    "no_examples": (LABELS, idx(np.zeros(0)), ["(0,)", "(12,)"]),
    "no_images": (IMAGES, idx(np.zeros((0, 28, 28))), ["(0, 28, 28)", "(12, 28, 28)"]),
    "one_image_less": (IMAGES, idx(np.zeros((11, 28, 28))), ["(11, 28, 28)", "(12, 28, 28)"]),
    "one_label_more": (LABELS, idx(np.zeros(13)), ["(13,)", "(12,)"]),
    "small_images": (IMAGES, idx(np.zeros((12, 14, 56))), ["(12, 14, 56)", "(12, 28, 28)"]),
    "flat_images": (IMAGES, idx(np.zeros((12, 784))), ["(12, 784)", "(12, 28, 28)"]),
    "labels_for_images": (IMAGES, GOOD[LABELS], ["(12,)", "(12, 28, 28)"]),
    "images_for_labels": (LABELS, GOOD[IMAGES], ["(12, 28, 28)", "(12,)"]),
    "test_for_train": (LABELS, GOOD["t10k-labels-idx1-ubyte"], ["(6,)", "(12,)"]),
    "label_10": (LABELS, change(GOOD[LABELS], 19, 10), ["label 10", "0 to 9"]),
    "label_255": ("t10k-labels-idx1-ubyte", change(GOOD["t10k-labels-idx1-ubyte"], 8, 255), ["label 255", "0 to 9"]),
}
PACKED = {name: gzip.compress(content, mtime=0) for name, content in GOOD.items()}
BAD_GZIP = {
    "empty": b"",
    "not_gzip": GOOD[IMAGES],
    "magic_only": PACKED[IMAGES][:2],
    "header_only": PACKED[IMAGES][:10],
    "half": PACKED[IMAGES][: len(PACKED[IMAGES]) // 2],
    "no_trailer": PACKED[IMAGES][:-8],
    "wrong_crc": change(PACKED[IMAGES], len(PACKED[IMAGES]) - 8, PACKED[IMAGES][-8] ^ 1),
    "wrong_size": change(PACKED[IMAGES], len(PACKED[IMAGES]) - 1, 77),
    "damaged_stream": change(PACKED[IMAGES], 12, PACKED[IMAGES][12] ^ 0xFF),
    "unknown_method": change(PACKED[IMAGES], 2, 7),
    "garbage_after": PACKED[IMAGES] + b"garbage",
}


def refusal(source: Source, world: World, *, fallback: bool = True) -> str:
    """Load data that must be refused without falling back to digits, and return the message."""
    printed: list[str] = []
    config = DataConfig(root=str(source.root), download=False, fallback=fallback)
    with pytest.raises(UserError) as error:
        data.load(config, world, printed.append)
    assert not isinstance(error.value, data.DataMissing)
    assert printed == []
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", BAD_IDX)
def test_load_refuses_a_malformed_file(case: str, packed: bool, source: Source, world: World) -> None:
    name, content, words = BAD_IDX[case]
    source.put(name, gzip.compress(content, mtime=0) if packed else content, packed=packed)
    source.trust()
    message = refusal(source, world)
    assert [word for word in [str(source.folder / name), *words] if word not in message] == []


@pytest.mark.parametrize("case", BAD_GZIP)
def test_load_refuses_a_damaged_gzip_file(case: str, source: Source, world: World) -> None:
    source.put(IMAGES, BAD_GZIP[case], packed=True)
    source.trust()
    message = refusal(source, world)
    assert str(source.folder / f"{IMAGES}") in message
    assert "Get it again" in message or "000008" in message


@pytest.mark.parametrize("at", [0, 9, 100, -1])
def test_load_refuses_a_file_with_another_checksum(at: int, source: Source, world: World) -> None:
    good = PACKED[IMAGES]
    at %= len(good)
    source.put(IMAGES, change(good, at, good[at] ^ 1), packed=True)
    message = refusal(source, world)
    found, expected = (hashlib.md5(content).hexdigest() for content in (change(good, at, good[at] ^ 1), good))
    assert [word for word in (f"{IMAGES}.gz", found, expected, "Delete it") if word not in message] == []


def test_load_refuses_a_directory_in_place_of_a_file(source: Source, world: World) -> None:
    (source.folder / f"{IMAGES}.gz").unlink()
    (source.folder / f"{IMAGES}.gz").mkdir()
    assert IMAGES in refusal(source, world)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse terabyte"])
def test_load_refuses_a_file_whose_reading_would_never_end(
    kind: str, packed: bool, source: Source, world: World
) -> None:
    (source.folder / f"{IMAGES}.gz").unlink()
    path = source.folder / (f"{IMAGES}.gz" if packed else IMAGES)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 10**12)
    assert f"{path} is not a file of at most 200,000,000 bytes" in refusal(source, world)


@pytest.mark.parametrize("layout", ["packed", "unpacked", "mixed", "flat", "environment"])
def test_load_reads_every_layout(layout: str, source: Source, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (name, content) in enumerate(GOOD.items()):
        if layout == "unpacked" or (layout == "mixed" and number % 2):
            source.put(name, content, packed=False)
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
    assert (found.mean, found.std) == pytest.approx(
        (float(pixels.mean()), float(pixels.std(unbiased=False))), rel=1e-12
    )
    assert sorted(str(path) for path in source.root.rglob("*")) == before


def test_load_falls_back_to_digits_only_if_files_are_missing(tmp_path: Path, world: World) -> None:
    printed: list[str] = []
    found = data.load(DataConfig(root=str(tmp_path), download=False, fallback=True), world, printed.append)
    assert (found.name, found.is_fallback, found.summary()["is_fallback"]) == ("digits", True, True)
    assert len(printed) == 1
    assert printed[0].startswith("warning: training on digits")
    assert str(tmp_path) in printed[0]
    with pytest.raises(data.DataMissing, match="mnist not found"):
        data.load(DataConfig(root=str(tmp_path), download=False), world)


@pytest.mark.parametrize("missing", data.FILES)
def test_load_names_the_file_that_is_missing(missing: str, source: Source, world: World) -> None:
    (source.folder / f"{missing}.gz").unlink()
    with pytest.raises(data.DataMissing) as error:
        data.load(source.config, world)
    assert f"{missing}.gz" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_load_names_the_ways_to_get_files_when_the_download_fails(
    name: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, root: Path) -> Path:
        assert root == tmp_path
        raise RuntimeError("Error downloading:\n<urlopen error>")

    monkeypatch.setattr(data, "download", fail)
    with pytest.raises(data.DataMissing) as error:
        data.load(DataConfig(name=name, root=str(tmp_path)), world)  # type: ignore[arg-type]
    words = (
        name,
        "Error downloading: <urlopen error>",
        "--data.root",
        "MNIST_ROOT",
        "--data.fallback",
        data.FOLDERS[name],
    )
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_a_download_that_fails_after_its_last_file_is_missing_data(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, root: Path) -> Path:
        folder = root / data.FOLDERS[name] / "raw"
        folder.mkdir(parents=True)
        for file in data.FILES:
            (folder / file).touch()
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(data, "download", fail)
    with pytest.raises(data.DataMissing, match="downloading failed: File not found or corrupted"):
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

"""A run trains on verified data only, and distinguishes missing files from damaged ones."""

import dataclasses
import gzip
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from train.config import DataConfig
from train.errors import UserError
from train.storage import arrays, built_in, data
from train.storage.arrays import Arrays
from train.world.world import World

RAW = Path("MNIST") / "raw"
DIGITS_SHA256, RANDOM_SHA256 = "59f5081b90bc0ada", "d0486dca0ea943e4"
COUNTS = {"train": 12, "t10k": 6}
IMAGES = "train-images-idx3-ubyte.gz"


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


GOOD = contents()
PACKED = {name: gzip.compress(content, mtime=0) for name, content in GOOD.items()}


class Source:
    """A root with a tiny data set whose checksums replace MNIST's."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        import torchvision.datasets

        self.root = root
        self.folder = root / RAW
        self.folder.mkdir(parents=True)
        for name, content in PACKED.items():
            (self.folder / name).write_bytes(content)
        sums = [(name, hashlib.md5(content).hexdigest()) for name, content in PACKED.items()]
        patch.setattr(torchvision.datasets.MNIST, "resources", sums)

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


# what a file may hold instead of its published content
BAD: dict[str, bytes] = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "not packed": GOOD[IMAGES],
    "half": PACKED[IMAGES][: len(PACKED[IMAGES]) // 2],
    "one byte short": PACKED[IMAGES][:-1],
    "one byte long": PACKED[IMAGES] + b"\0",
    "other file": PACKED["train-labels-idx1-ubyte.gz"],
    "packed again": gzip.compress(GOOD[IMAGES], mtime=1),
    **{f"flipped bit in byte {at}": change(PACKED[IMAGES], at, PACKED[IMAGES][at] ^ 1) for at in (0, 9, 100, -1)},
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
def test_load_refuses_a_file_with_another_checksum(case: str, source: Source, world: World) -> None:
    path = source.folder / IMAGES
    path.write_bytes(BAD[case])
    found, expected = (hashlib.md5(content).hexdigest() for content in (BAD[case], PACKED[IMAGES]))
    assert f"{path} has MD5 {found}, expected {expected}. Delete it and get it again." in refusal(source, world)


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
        "Error downloading: <urlopen error>",
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
    with pytest.raises(built_in.DataMissing, match="downloading failed: File not found or corrupted"):
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


class Cifar:
    """A root with a tiny CIFAR data set in its published form, whose checksums replace the original ones."""

    def __init__(self, name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
        import torchvision.datasets

        dataset = getattr(torchvision.datasets, built_in.PUBLISHED[name].dataset)
        generator, self.root = np.random.default_rng(0), root
        self.folder = root / dataset.base_folder
        self.folder.mkdir(parents=True)
        self.classes = [f"{name} {label}" for label in range(built_in.PUBLISHED[name].num_classes)]
        self.images, self.labels = [], []
        key = "labels" if name == "cifar10" else "fine_labels"
        sums = {}
        for file in built_in.PUBLISHED[name].files:
            planes = generator.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
            labels = [int(label) for label in generator.integers(0, len(self.classes), 2)]
            content = {"data": planes.reshape(2, -1), key: labels}
            if "meta" in file:
                content = {dataset.meta["key"]: self.classes}
            else:
                self.images.append(planes)
                self.labels += labels
            (self.folder / file).write_bytes(pickle.dumps(content))
            sums[file] = hashlib.md5((self.folder / file).read_bytes()).hexdigest()
        patch.setattr(dataset, "train_list", [(file, sums[file]) for file, _ in dataset.train_list])
        patch.setattr(dataset, "test_list", [(file, sums[file]) for file, _ in dataset.test_list])
        patch.setattr(dataset, "meta", dataset.meta | {"md5": sums[dataset.meta["filename"]]})


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_in_colour_with_its_class_names(
    name: str, tmp_path: Path, cache: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Cifar(name, tmp_path, monkeypatch)
    config = DataConfig(name=name, root=str(tmp_path), download=False)
    for _ in range(2):  # from its files, then from the cache
        found = data.load(config, world)
        assert (found.shape, found.num_classes, found.class_names) == ((3, 32, 32), len(made.classes), made.classes)
        images = torch.cat((found.train.images, found.test.images)).numpy()
        assert np.array_equal(images, np.concatenate(made.images))
        assert torch.cat((found.train.labels, found.test.labels)).tolist() == made.labels
        planes = np.concatenate(made.images[:-1]).transpose(1, 0, 2, 3).reshape(3, -1)
        assert found.mean == pytest.approx(planes.mean(1))
        assert found.std == pytest.approx(planes.std(1))


def test_cifar_with_another_checksum_is_refused_before_it_is_unpickled(
    tmp_path: Path, cache: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Cifar("cifar10", tmp_path, monkeypatch)
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    (made.folder / "data_batch_3").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"cifar-10-batches-py is damaged: .*Delete it and get it again"):
        data.load(DataConfig(name="cifar10", root=str(tmp_path), download=False), world)


def a_file(path: Path, *, num_validation: int = 0, shape: tuple[int, ...] = (24, 40, 3)) -> DataConfig:
    """Write a file of random images in three classes, and return the config that names it."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for part, size in (("train", 30), ("validation", num_validation), ("test", 9)):
        if size:
            images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8, generator=generator)
            tensors |= {f"{part}_images": images, f"{part}_labels": torch.arange(size) % 3}
    arrays.write(path, Arrays(tensors, ["a", "b", "c"]))
    return DataConfig(name=str(path))


def test_a_file_decides_channels_sizes_and_classes(tmp_path: Path, world: World) -> None:
    found = data.load(a_file(tmp_path / "x.safetensors"), world)
    assert (found.name, found.shape, found.num_classes) == ("x.safetensors", (3, 24, 40), 3)
    assert (found.class_names, found.eval_split, found.is_fallback) == (["a", "b", "c"], "test", False)
    assert (len(found.train), len(found.test), len(found.mean), len(found.std)) == (30, 9, 3, 3)


def test_the_sha256_of_a_file_is_that_of_its_content(tmp_path: Path, world: World, cache: Path) -> None:
    first = data.load(a_file(tmp_path / "x.safetensors"), world)
    tensors = arrays.read(tmp_path / "x.safetensors").tensors
    path = tmp_path / "elsewhere" / "y.npz"
    path.parent.mkdir()
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    for _ in range(2):  # from the file, then from the cache
        again = data.load(DataConfig(name=str(path)), world)
        assert again.sha256 == first.sha256
        assert torch.equal(again.train.images, first.train.images)
    tensors["test_labels"][0] += 1
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    assert data.load(DataConfig(name=str(path)), world).sha256 != first.sha256


def test_a_validation_split_of_the_file_is_evaluated_unless_test_is_asked_for(tmp_path: Path, world: World) -> None:
    config = a_file(tmp_path / "x.safetensors", num_validation=6)
    for eval_split, expected in (("auto", "validation"), ("validation", "validation"), ("test", "test")):
        found = data.load(dataclasses.replace(config, eval_split=eval_split), world)
        assert (found.eval_split, len(found.test), len(found.train)) == (expected, {"validation": 6, "test": 9}[expected], 30)
    with pytest.raises(UserError, match="has a validation split of its own"):
        data.load(dataclasses.replace(config, validation=3), world)


def test_held_out_examples_can_be_left_out_of_training_and_the_test_split_evaluated(world: World) -> None:
    found = data.load(DataConfig(name="random", random_examples=60, validation=20, eval_split="test"), world)
    assert (found.eval_split, len(found.train), len(found.test)) == ("test", 40, 10)
    with pytest.raises(UserError, match=r"data\.eval_split is validation, and random has none"):
        data.load(DataConfig(name="random", random_examples=60, eval_split="validation"), world)


def test_holding_out_a_whole_class_of_a_sorted_file_is_refused(tmp_path: Path, world: World) -> None:
    tensors = arrays.read(Path(a_file(tmp_path / "x.safetensors").name)).tensors
    tensors["train_labels"] = tensors["train_labels"].sort().values
    arrays.write(tmp_path / "sorted.safetensors", Arrays(tensors, ["a", "b", "c"]))
    config = DataConfig(name=str(tmp_path / "sorted.safetensors"), validation=10)
    with pytest.raises(UserError, match=r"holds out all training examples of class c of sorted\.safetensors"):
        data.load(config, world)


def test_images_of_one_colour_are_refused(tmp_path: Path, world: World) -> None:
    tensors = arrays.read(Path(a_file(tmp_path / "x.safetensors").name)).tensors
    tensors["train_images"] = tensors["train_images"].clone()
    tensors["train_images"][..., 1] = 7
    arrays.write(tmp_path / "flat.safetensors", Arrays(tensors, ["a", "b", "c"]))
    with pytest.raises(UserError, match=r"All training images of flat\.safetensors have one colour"):
        data.load(DataConfig(name=str(tmp_path / "flat.safetensors")), world)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_data_that_do_not_fit_on_the_device_are_refused_before_they_are_read(
    suffix: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_file(tmp_path / "x.safetensors")
    if suffix == "npz":
        np.savez(tmp_path / "x.npz", **{k: v.numpy() for k, v in arrays.read(tmp_path / "x.safetensors").tensors.items()})
        config = DataConfig(name=str(tmp_path / "x.npz"))
    monkeypatch.setattr(data, "free_bytes", lambda device: 100_000)
    monkeypatch.setattr(arrays, "read", lambda path: pytest.fail("read"))
    with pytest.raises(UserError, match=r"x\.(npz|safetensors) needs .* and .* free"):
        data.load(config, world)


def test_built_in_data_that_do_not_fit_on_the_device_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(UserError, match=r"digits needs .* and .* free"):
        data.load(DataConfig(name="digits"), world)

"""Data sets in colour and in files: their content decides channels, sizes, classes and splits."""

import dataclasses
import hashlib
import os
import pickle  # noqa: TID251  CIFAR's files are pickles
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks.processes import Ranks, arguments

from launch.__main__ import main as launch
from launch.check import checks
from train.__main__ import main as train_main
from train.cli import parse
from train.config import DataConfig
from train.errors import UserError
from train.storage import arrays, built_in, data
from train.storage.arrays import Arrays
from train.world.world import World


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache directory for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lockstep"


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


def test_cifar_is_not_taken_for_a_folder_that_has_its_names(tmp_path: Path, cache: Path, world: World) -> None:
    for name in built_in.PUBLISHED["cifar100"].files:
        (tmp_path / name).mkdir()
    with pytest.raises(built_in.DataMissing, match="cifar100 not found"):
        data.load(DataConfig(name="cifar100", root=str(tmp_path), download=False), world)


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


def test_a_file_that_is_overwritten_in_place_leaves_the_data_of_a_run_alone(tmp_path: Path, world: World) -> None:
    path = tmp_path / "x.safetensors"
    found = data.load(a_file(path), world)
    before = found.train.images.clone()
    with path.open("r+b") as file:
        file.seek(-20_000, os.SEEK_END)
        file.write(b"\xff" * 20_000)
    assert torch.equal(found.train.images, before)


def test_a_file_decides_channels_sizes_and_classes(tmp_path: Path, world: World) -> None:
    found = data.load(a_file(tmp_path / "x.safetensors"), world)
    assert (found.name, found.shape, found.num_classes) == ("x.safetensors", (3, 24, 40), 3)
    assert (found.class_names, found.eval_split, found.is_fallback) == (["a", "b", "c"], "test", False)
    assert (len(found.train), len(found.test), len(found.mean), len(found.std)) == (30, 9, 3, 3)


@pytest.mark.parametrize("name", ["a" * 245 + ".npz", "ö" * 120 + ".npz", "two\nlines.npz"])
def test_any_name_of_a_file_can_be_used(name: str, tmp_path: Path, cache: Path, world: World) -> None:
    tensors = arrays.read(Path(a_file(tmp_path / "x.safetensors").name)).tensors
    np.savez(tmp_path / name, **{name: tensor.numpy() for name, tensor in tensors.items()})
    assert data.load(DataConfig(name=str(tmp_path / name)), world).name == name


@pytest.mark.parametrize("name", ["absent.npz", "absent.safetensors", "two\nlines.npz"])
def test_a_file_that_is_not_there_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    for command in (
        train_main,
        lambda argv: launch(["plan", "--", *argv]),
        lambda argv: launch(["slurm", "--", *argv]),
    ):
        assert command(["--data.name", str(path), "--run.dir", str(tmp_path)]) == 2
        assert capsys.readouterr().err.splitlines() == [
            f"error: {' '.join(str(path).splitlines())} does not exist. Expected images."
        ]
    config = parse(["--data.name", str(path)])
    (finding,) = checks.data(config)
    assert (finding.status, finding.remedy) == ("fail", f"python -m launch data {path}")


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
        assert (found.eval_split, len(found.test), len(found.train)) == (
            expected,
            {"validation": 6, "test": 9}[expected],
            30,
        )
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
        np.savez(
            tmp_path / "x.npz", **{k: v.numpy() for k, v in arrays.read(tmp_path / "x.safetensors").tensors.items()}
        )
        config = DataConfig(name=str(tmp_path / "x.npz"))
    monkeypatch.setattr(data, "free_bytes", lambda device: 100_000)
    monkeypatch.setattr(arrays, "read", lambda path: pytest.fail("read"))
    with pytest.raises(UserError, match=r"x\.(npz|safetensors) needs .* and .* free"):
        data.load(config, world)


def test_the_memory_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 80 * 2**30))
    with pytest.raises(UserError, match=r"cells needs 5\.0 GiB and 3\.0 GiB of GPU memory are free"):
        data.check_memory(5 * 2**30, torch.device("cuda", 0), "cells")


def test_data_that_do_not_fit_on_one_rank_are_refused_on_all(tmp_path: Path) -> None:
    ranks = Ranks(2, arguments(tmp_path / "run"), tmp_path / "logs", MUTANT="accidents.no_memory_for_data")
    assert ranks.wait() == [2, 2]
    assert [line.partition(" needs ")[0] for line in ranks.output().splitlines()] == ["error: digits"]


def test_built_in_data_that_do_not_fit_on_the_device_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(UserError, match=r"digits needs .* and .* free"):
        data.load(DataConfig(name="digits"), world)

"""The data cache makes second starts light, is rebuilt when damaged, and is shared by processes."""

import errno
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT

from train.config import DataConfig
from train.storage import built_in, data
from train.world.world import World

SCRIPT = """
import sys
from train.config import DataConfig
from train.storage.data import prepare
found, sha256 = prepare(DataConfig(name=sys.argv[1], download=False))
print(sha256, len(found.tensors["train_labels"]), sorted({"torchvision", "sklearn"} & set(sys.modules)))
"""
MNIST_SHA256 = "2c3caa71b3aa4e51b9c1a979edfa9e62e586ff3155cb59dfe526d7af40e9a699"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache directory for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lockstep"


def listing(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in [root, *root.rglob("*")])


def test_cache_dir_honours_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert built_in.cache_dir() == tmp_path / "lockstep"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert built_in.cache_dir() == tmp_path / "home" / ".cache" / "lockstep"


@pytest.mark.mnist
def test_mnist_is_verified_and_cached_and_its_folder_is_left_alone(
    cache: Path, mnist_root: Path, python: Callable, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(mnist_root)
    monkeypatch.setenv("MNIST_ROOT", str(mnist_root))
    found = data.load(DataConfig(download=False), world)
    assert (found.name, len(found.train), len(found.test), found.sha256) == ("mnist", 60_000, 10_000, MNIST_SHA256)
    assert (found.mean[0] / 255, found.std[0] / 255) == pytest.approx((0.1307, 0.3081), abs=5e-5)
    assert found.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert found.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    # A second start needs no torchvision.
    assert python("-c", SCRIPT, "mnist").stdout.strip() == f"{MNIST_SHA256} 60000 []"
    assert listing(mnist_root) == before


def flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def without_checksum(content: bytes) -> bytes:
    return safetensors.torch.save(safetensors.torch.load(content))


def with_tensor_missing(content: bytes) -> bytes:
    tensors = safetensors.torch.load(content)
    del tensors["test_labels"]
    return safetensors.torch.save(tensors, {"sha256": "0" * 64})


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "garbage": lambda content: b"garbage" * 100,
    "short": lambda content: content[:-1],
    "long": lambda content: content + b"\0",
    "half": lambda content: content[: len(content) // 2],
    "flipped_bit": flip,
    "header": lambda content: b"\xff" * 8 + content[8:],
    "no_checksum": without_checksum,
    "tensor_missing": with_tensor_missing,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_rebuilt(damage: str, cache: Path) -> None:
    config = DataConfig(name="digits")
    first, sha256 = data.prepare(config)
    (path,) = cache.glob("digits-*.safetensors")
    good = path.read_bytes()
    path.unlink()  # `first` is mapped from it
    path.write_bytes(DAMAGES[damage](good))
    assert data.load_cache(path) is None
    again, found = data.prepare(config)
    assert found == sha256
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    assert again.class_names == first.class_names
    assert path.read_bytes() == good
    assert sorted(file.suffix for file in cache.iterdir()) == [".lock", ".safetensors"]


def test_touched_source_is_another_source(tmp_path: Path, cache: Path) -> None:
    for name in built_in.IDX_FILES:
        (tmp_path / name).write_bytes(b"x")
    config = DataConfig(root=str(tmp_path), download=False)
    before = data.cache_file(config)
    assert data.cache_file(config) == before
    os.utime(tmp_path / built_in.IDX_FILES[0], ns=(1, 1))
    assert data.cache_file(config) != before


def test_two_processes_at_once_prepare_once_and_the_second_imports_no_parser(cache: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, "digits"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outcomes = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0]
    lines = [out.split() for out, _ in outcomes]
    assert lines[0][:2] == lines[1][:2]
    assert sorted(line[2] for line in lines) == ["['sklearn']", "[]"]  # one reads, the other waits for the cache
    assert sorted(file.suffix for file in cache.iterdir()) == [".lock", ".safetensors"]


def test_images_are_shared_by_the_processes_of_a_machine(cache: Path, world: World) -> None:
    """From the first start on, images are mapped from the cache's file, and no page of them is private."""
    for _ in range(2):
        images = data.load(DataConfig(name="digits"), world).train.images
        images.sum()  # touch all of it
        areas = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]
        bounds = [tuple(int(end, 16) for end in area.split(" ", 1)[0].split("-")) for area in areas]
        (area,) = (area for area, (low, high) in zip(areas, bounds, strict=True) if low <= images.data_ptr() < high)
        assert str(next(cache.glob("digits-*.safetensors"))) in area
        assert re.search(r"(?m)^Anonymous: +0 kB$", area)
        assert int(re.search(r"(?m)^Rss: +(\d+) kB$", area)[1]) * 1024 >= images.nbytes  # type: ignore[index]


def test_good_cache_is_read_while_another_process_holds_its_lock(cache: Path) -> None:
    config = DataConfig(name="digits")
    _, sha256 = data.prepare(config)
    with (cache / "digits.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert data.prepare(config)[1] == sha256


def test_full_disk_costs_the_cache_and_not_the_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    found, sha256 = data.prepare(DataConfig(name="digits"))
    assert data.content_sha256(found.tensors) == sha256
    assert [path.name for path in cache.iterdir()] == ["digits.lock"]

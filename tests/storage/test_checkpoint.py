"""A checkpoint on the disk is whole or absent, verified before use, and never deleted when damaged."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import small_state as state

from train.errors import UserError
from train.storage import checkpoint
from train.storage.checkpoint import decode, encode
from train.storage.lease import Lease


def write(checkpoints: Path, *steps: int) -> list[Path]:
    return [write_files(checkpoints, step, encode(state(step))) for step in steps]


def write_files(checkpoints: Path, step: int, files: checkpoint.Files) -> Path:
    with Lease(checkpoints.parent, is_main=True) as lease, lease.writing() as staging:
        return checkpoint.write(checkpoints, step, files, staging)


def prune(checkpoints: Path, keep: int, needed: set[int]) -> None:
    with Lease(checkpoints.parent, is_main=True) as lease, lease.writing() as staging:
        checkpoint.prune(checkpoints, keep, needed, staging)


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """Return the directory of a run's checkpoints. The run's lock is next to it."""
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def tree(path: Path) -> dict[str, bytes]:
    """Return every file under a directory with its content."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return a damage that changes the content of one file."""
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes())) and None  # type: ignore[func-returns-value]


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Return a damage that changes the parsed manifest in place, or replaces it by the change's result."""

    def damage(path: Path) -> None:
        parsed = json.loads((path / "manifest.json").read_text())
        changed = change(parsed)
        (path / "manifest.json").write_text(json.dumps(parsed if changed is None else changed))

    return damage


def with_checksum(name: str, content: bytes) -> Callable[[Path], None]:
    """Return a damage with a matching checksum, as of a file that was written like this."""

    def damage(path: Path) -> None:
        (path / name).write_bytes(content)
        manifest(lambda parsed: parsed["sha256"].update({name: hashlib.sha256(content).hexdigest()}))(path)

    return damage


def replace_by_directory(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return damage


FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json")
DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{f"flipped bit in {name}": (name, edit(name, flip)) for name in FILES},
    **{f"half of {name}": (name, edit(name, half)) for name in FILES},
    **{f"no {name}": (name, remove(name)) for name in FILES},
    "empty model": ("model.safetensors", edit("model.safetensors", lambda content: b"")),
    "longer model": ("model.safetensors", edit("model.safetensors", lambda content: content + b"\0")),
    "other step's model": (
        "model.safetensors",
        edit("model.safetensors", lambda _: encode(state(9))["model.safetensors"]),
    ),
    "directory for a file": ("ema.safetensors", replace_by_directory("ema.safetensors")),
    "no manifest": ("manifest.json", remove("manifest.json")),
    "empty manifest": ("", edit("manifest.json", lambda content: b"")),
    "half of manifest": ("", edit("manifest.json", half)),
    "manifest is a directory": ("manifest.json", replace_by_directory("manifest.json")),
    "binary manifest": ("", edit("manifest.json", lambda content: b"\xff\xfe\0\x80")),
    "deeply nested manifest": ("", edit("manifest.json", lambda content: b"[" * 100_000)),
    "manifest is a list": ("", manifest(lambda parsed: [parsed])),
    "manifest is a number": ("", manifest(lambda parsed: 3)),
    "manifest without schema": ("schema", manifest(lambda parsed: parsed.pop("schema") and None)),
    "later schema": ("format 99", manifest(lambda parsed: parsed.update(schema=99))),
    "manifest without sums": ("sha256", manifest(lambda parsed: parsed.pop("sha256") and None)),
    "sums are a list": ("", manifest(lambda parsed: parsed.update(sha256=["model.safetensors"]))),
    "sums are empty": ("state.json", manifest(lambda parsed: parsed.update(sha256={}))),
    "sum is null": ("model.safetensors", manifest(lambda parsed: parsed["sha256"].update({"model.safetensors": None}))),
    "sum is a number": (
        "model.safetensors",
        manifest(lambda parsed: parsed["sha256"].update({"model.safetensors": 3})),
    ),
    "sum of another file": (
        "ema.safetensors",
        manifest(lambda parsed: parsed["sha256"].update({"ema.safetensors": "0" * 64})),
    ),
    "unlisted model": (
        "model.safetensors",
        manifest(lambda parsed: parsed["sha256"].pop("model.safetensors") and None),
    ),
    "listed file is not there": ("extra", manifest(lambda parsed: parsed["sha256"].update(extra="0" * 64))),
    "file outside": (
        "state.json",
        manifest(lambda parsed: parsed["sha256"].update({"../state.json": parsed["sha256"].pop("state.json")})),
    ),
    "name with NUL": ("", manifest(lambda parsed: parsed["sha256"].update({"a\0b": "0" * 64}))),
    "state is no JSON": ("", with_checksum("state.json", b"{")),
    "state is a list": ("", with_checksum("state.json", b"[]")),
    "state without step": ("step", with_checksum("state.json", b"{}")),
    "model is no safetensors": ("SafetensorError", with_checksum("model.safetensors", b"garbage")),
    "model of zeros": ("SafetensorError", with_checksum("model.safetensors", bytes(100))),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_latest_skips_a_malformed_checkpoint_for_the_one_before(case: str, tmp_path: Path) -> None:
    older, newer = write(tmp_path, 10, 20)
    word, damage = DAMAGES[case]
    damage(newer)
    before = tree(tmp_path)
    printed: list[str] = []
    found = checkpoint.latest(tmp_path, printed.append)
    assert found is not None
    assert found[0] == older
    assert decode(found[1]).meta["step"] == 10
    assert len(printed) == 1
    assert str(newer) in printed[0]
    assert word in printed[0]
    assert "\n" not in printed[0]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("case", ["no manifest", "flipped bit in model.safetensors", "sums are empty"])
def test_latest_refuses_when_none_is_whole_and_deletes_nothing(case: str, tmp_path: Path) -> None:
    for path in write(tmp_path, 10, 20, 30):
        DAMAGES[case][1](path)
    before = tree(tmp_path)
    printed: list[str] = []
    with pytest.raises(UserError, match=r"None of the 3 checkpoints .* Nothing was deleted") as error:
        checkpoint.latest(tmp_path, printed.append)
    assert str(tmp_path) in str(error.value)
    assert len(printed) == 3
    assert tree(tmp_path) == before


def test_latest_finds_nothing_in_an_empty_directory(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent", pytest.fail) is None
    for name in ("step-10", "step-0000001x", ".writing-step-00000010", "damaged-step-00000010-0", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000030").write_text("a file")
    assert checkpoint.latest(tmp_path, pytest.fail) is None


def test_latest_takes_the_highest_step(tmp_path: Path) -> None:
    paths = write(tmp_path, 99_999_999, 100, 100_000_000, 9)
    found = checkpoint.latest(tmp_path, pytest.fail)
    assert found is not None
    assert found[0] == paths[2]
    assert [checkpoint.step_of(path) for path in checkpoint.directories(tmp_path)] == [100_000_000, 99_999_999, 100, 9]


def test_write_then_read_gives_the_state_back(tmp_path: Path) -> None:
    path = write_files(tmp_path.parent / "new" / "checkpoints", 10, encode(state()))
    assert path.name == "step-00000010"
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "manifest.json"])
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]
    found, expected = decode(checkpoint.read(path)), state()
    assert found.meta == expected.meta
    for part in ("model", "optimizer", "ema"):
        tensors, wanted = getattr(found, part), getattr(expected, part)
        assert tensors.keys() == wanted.keys()
        assert all(tensors[name].equal(wanted[name]) for name in wanted)


def test_write_leaves_a_whole_checkpoint_of_the_step_as_it_is(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 10)
    before = tree(tmp_path)
    assert write_files(tmp_path, 10, encode(state(11))) == path
    assert tree(tmp_path) == before


def test_write_moves_a_damaged_checkpoint_of_the_step_aside(tmp_path: Path) -> None:
    damaged = []
    for _ in range(3):
        (path,) = write(tmp_path, 10)
        edit("model.safetensors", flip)(path)
        damaged.append(tree(path))
    (tmp_path / "damaged-step-00000010-0").rename(tmp_path / "kept")  # a user moved one: its number is free again
    write(tmp_path, 10)
    assert decode(checkpoint.read(path)).meta["step"] == 10
    others = [tree(other) for other in tmp_path.iterdir() if other != path]
    assert len(others) == 3
    assert all(content in others for content in damaged)


def test_write_survives_a_save_that_failed(tmp_path: Path) -> None:
    with Lease(tmp_path.parent, is_main=True) as lease:
        leftover = lease.staging / "step-00000010"
        leftover.mkdir()
        (leftover / "model.safetensors").write_text("half")
        path = checkpoint.write(tmp_path, 10, encode(state(10)), lease.staging)
        assert checkpoint.read(path).keys() == {*FILES, "manifest.json"} - {"manifest.json"}
        assert list(lease.staging.iterdir()) == []


def test_write_that_fails_leaves_no_name_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 10)
    assert checkpoint.directories(tmp_path) == []


ALL = [50, 40, 30, 20, 10]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, [50]), (2, None, [50, 40]), (2, 10, [50, 40, 10]), (2, 50, [50, 40]), (9, 10, ALL)],
)
def test_prune_keeps_the_newest_and_the_best(keep: int, best: int | None, left: list[int], tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30, 40, 50)
    prune(tmp_path, keep, {best} if best else set())
    assert [checkpoint.step_of(path) for path in checkpoint.directories(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_prune_neither_counts_nor_deletes_damaged_checkpoints(tmp_path: Path) -> None:
    paths = write(tmp_path, 10, 30)
    edit("model.safetensors", flip)(paths[1])  # a run resumed from 10 and saves 20 now
    write(tmp_path, 20)
    prune(tmp_path, 1, set())
    found = checkpoint.latest(tmp_path, lambda line: None)
    assert found is not None
    assert found[0].name == "step-00000020"
    write(tmp_path, 40)
    prune(tmp_path, 1, set())
    assert [checkpoint.step_of(path) for path in checkpoint.directories(tmp_path)] == [40, 30]

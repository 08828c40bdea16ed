"""An exported file describes itself, gives the checkpoint's logits, unpickles nothing and is refused when damaged."""

import json
import pickle  # noqa: TID251  to show that it is never used
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from launch.__main__ import main
from launch.deploy import formats
from launch.deploy.formats import SUFFIXES
from train.config import DataConfig
from train.errors import UserError
from train.storage import checkpoint, data
from train.storage.checkpoint import Damaged

KINDS = list(SUFFIXES)


@pytest.fixture
def copies(exported: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Return exported files that a test may damage."""
    return {kind: Path(shutil.copy(path, tmp_path)) for kind, path in exported.items()}


def images_of_the_test_split() -> torch.Tensor:
    return data.prepare(DataConfig(name="digits"))[0].tensors["test_images"][:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_file_gives_the_checkpoints_logits(kind: str, exported: dict[str, Path], digits_run: Path) -> None:
    original = formats.load(digits_run, None)
    found = formats.read(exported[kind])
    assert found.facts == original.facts
    images = images_of_the_test_split()
    torch.testing.assert_close(found.scores(images), original.scores(images), atol=1e-4, rtol=1e-4)
    assert original.facts.step == json.loads((digits_run / "summary.json").read_text())["best"]["step"]
    assert (original.facts.weights, original.facts.data, original.facts.model) == ("ema", "digits", "tiny")


def test_exported_files_work_without_this_project(exported: dict[str, Path], digits_run: Path) -> None:
    """This follows the cards' instructions, which need no code of this project."""
    with safetensors.safe_open(exported["safetensors"], "pt") as file:
        facts = file.metadata()
    images = images_of_the_test_split()
    (mean,), (std,) = (json.loads(facts[name]) for name in ("mean", "std"))
    inputs = (images.float() - mean) / std
    wanted = formats.load(digits_run, None).scores(images)
    assert facts["model"] == "tiny"
    assert json.loads(facts["class_names"]) == list("0123456789")
    session = onnxruntime.InferenceSession(exported["onnx"], providers=["CPUExecutionProvider"])
    assert {**facts}.items() <= session.get_modelmeta().custom_metadata_map.items()
    for some in (inputs, inputs[:1]):  # any number of images
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {"inputs": some.numpy()})[0]), wanted[: len(some)]
        )
    weights = load_file(exported["safetensors"])
    assert checkpoint.tensors_sha256(weights) == facts["weights_sha256"]


def test_onnx_file_needs_no_newer_runtime_than_its_operators(exported: dict[str, Path]) -> None:
    """onnxruntime 1.16 of 2023 takes opset 19 and IR version 9 at most."""
    proto = onnx.load(exported["onnx"])
    assert (proto.opset_import[0].version, proto.ir_version) == (15, 8)
    card = exported["onnx"].with_name(f"{exported['onnx'].name}.md").read_text()
    assert "ONNX opset 15, IR version 8" in card
    assert "ONNX" not in exported["safetensors"].with_name(f"{exported['safetensors'].name}.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_writing_and_reading_never_unpickles(
    kind: str, digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("unpickled")

    class Refuse(pickle.Unpickler):
        def load(self) -> Any:
            return refuse()

    if kind != "onnx":  # torch's exporter deep-copies and unpickles its own decompositions; reading is below
        for name in ("load", "loads"):
            monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(pickle, "Unpickler", Refuse)
    assert main(["export", str(digits_run), "--format", kind, "--output", str(tmp_path)]) == 0
    formats.read(tmp_path / f"model{SUFFIXES[kind]}")


def metadata(**changes: str | None) -> Callable[[Path], None]:
    """Return a damage of a safetensors file's metadata. None removes an entry."""

    def damage(path: Path) -> None:
        with safetensors.safe_open(path, "pt") as file:
            facts = {**file.metadata(), **changes}
        save_file(load_file(path), path, {name: value for name, value in facts.items() if value is not None})

    return damage


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 64
    path.write_bytes(bytes(content))


def huge_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def weights_of(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path, {"weights_sha256": checkpoint.tensors_sha256(tensors)})


NINE_CLASSES = "[" + ", ".join('"a"' for _ in range(9)) + "]"
DAMAGES: list[tuple[str, str, Callable[[Path], Any], str]] = [
    *[(kind, "empty", lambda path: path.write_bytes(b""), "model") for kind in KINDS],
    *[(kind, "half", halve, "model") for kind in KINDS],
    *[(kind, "text", lambda path: path.write_text("<html>404</html>"), "model") for kind in KINDS],
    *[(kind, "zeros", lambda path: path.write_bytes(bytes(4096)), "model") for kind in KINDS],
    *[(kind, "pickle", lambda path: path.write_bytes(pickle.dumps({"a": 1})), "model") for kind in KINDS],
    *[(kind, "directory", lambda path: (path.unlink(), path.mkdir()), "") for kind in KINDS],
    ("safetensors", "flipped weight", lambda path: flip(path, -5), "damaged: its weights have SHA-256"),
    ("safetensors", "huge header", huge_header, "not a whole safetensors"),
    ("safetensors", "no metadata", lambda path: save_file(load_file(path), path), "lack: 'model'"),
    ("safetensors", "unknown model", metadata(model="resnet"), "lack: a known model"),
    ("safetensors", "no mean", metadata(mean=None), "lack: 'mean'"),
    ("safetensors", "mean of words", metadata(mean="many"), "lack"),
    ("safetensors", "std 0", metadata(std="[0]"), "lack: std of each channel's pixels"),
    ("safetensors", "std NaN", metadata(std="[NaN]"), "lack: std of each channel's pixels"),
    ("safetensors", "a number as std", metadata(std="78.5"), "lack: std of each channel's pixels"),
    ("safetensors", "two means", metadata(mean="[33, 33]"), "lack: mean of each channel's pixels"),
    ("safetensors", "nine classes", metadata(class_names=NINE_CLASSES), "do not fit this model"),
    ("safetensors", "classes are numbers", metadata(class_names=str(list(range(10)))), "lack: a list of class_names"),
    ("safetensors", "one class", metadata(class_names='["a"]'), "lack: a list of class_names"),
    ("safetensors", "another shape", metadata(shape="[1, 28, 32]"), "do not fit this model"),
    ("safetensors", "a shape of words", metadata(shape='["1", "28", "28"]'), "lack: a shape of images"),
    ("safetensors", "deep config", metadata(config="[" * 100_000), "lack"),
    ("safetensors", "another model", metadata(model="cnn"), "do not fit this model"),
    ("safetensors", "foreign weights", weights_of({"a": torch.zeros(3)}), "lack"),
    ("onnx", "flipped weight", lambda path: flip(path, path.read_bytes().find(b"conv1.weight") + 60), "onnx"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "case", "damage", "words"), DAMAGES, ids=[f"{kind}-{case}" for kind, case, *_ in DAMAGES]
)
def test_damaged_file_is_refused_in_one_line(
    kind: str, case: str, damage: Callable[[Path], Any], words: str, copies: dict[str, Path]
) -> None:
    damage(copies[kind])
    with pytest.raises(UserError) as error:
        formats.read(copies[kind])
    assert str(copies[kind]) in str(error.value) or isinstance(error.value, Damaged)  # of another model's tensors
    assert words in str(error.value)
    assert "\n" not in str(error.value)

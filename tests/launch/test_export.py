"""An exported file describes itself, gives the checkpoint's predictions, and unpickles nothing."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.__main__ import main
from launch.deploy import formats
from launch.deploy.formats import SUFFIXES
from train.config import DataConfig
from train.storage import checkpoint, data

KINDS = list(SUFFIXES)


def export_to(run: Path, folder: Path, kind: str = "safetensors", *flags: str) -> Path:
    """Export a run into a folder; return the file."""
    assert main(["export", str(run), "--format", kind, "--output", str(folder), *flags]) == 0
    return folder / f"model{SUFFIXES[kind]}"


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may damage."""
    return shutil.copytree(digits_run, tmp_path / "run")


def refusal(argv: list[Any], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Start an export that must be refused; return the one line."""
    assert main(["export", *map(str, argv)]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def images_of_the_test_split() -> torch.Tensor:
    return data.prepare(DataConfig(name="digits"))[0].tensors["test_images"][:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_card_has_data_accuracy_commit_and_config(kind: str, exported: dict[str, Path], digits_run: Path) -> None:
    card = exported[kind].with_name(f"{exported[kind].name}.md").read_text()
    summary = json.loads((digits_run / "summary.json").read_text())
    correct = round(summary["best"]["accuracy"] * 359)
    words = (
        f"({correct} of 359)",
        f"computed in\nfp32 and recorded {correct} right ones",
        summary["sha256"]["data"],
        formats.read(exported[kind]).facts.weights_sha256,
        "3,786 parameters",
        f"step {summary['best']['step']} of run `digits`",
        str(summary["git_commit"] or "unknown"),
        "optim.lr: 0.05",
        exported[kind].name,
        "gives the checkpoint's prediction for each of 359",
        f"{exported[kind].stat().st_size:,} bytes",
    )
    assert [word for word in words if word not in card] == []
    assert "{" not in card.split("## Use")[0]


def test_raw_weights_and_another_checkpoint_are_taken_when_asked(digits_run: Path, tmp_path: Path) -> None:
    newest = checkpoint.directories(digits_run / "checkpoints")[0]
    path = export_to(digits_run, tmp_path, "safetensors", "--weights", "raw", "--checkpoint", str(newest))
    facts = formats.read(path).facts
    assert (facts.weights, facts.step) == ("raw", checkpoint.step_of(newest))
    assert facts.weights_sha256 == json.loads((digits_run / "summary.json").read_text())["weights_sha256"]


def change_states(run: Path, change: Callable[[checkpoint.Snapshot], checkpoint.Snapshot]) -> None:
    """Write all checkpoints of a run again, each a whole one."""
    for path in checkpoint.directories(run / "checkpoints"):
        state = change(checkpoint.decode(checkpoint.read(path)))
        shutil.rmtree(path)
        checkpoint.write(path.parent, checkpoint.step_of(path), checkpoint.encode(state), path.parent.parent)


def test_best_checkpoint_is_taken_and_the_newest_where_it_is_damaged(run: Path, tmp_path: Path, capsys: Any) -> None:
    newest, *_, oldest = [checkpoint.step_of(path) for path in checkpoint.directories(run / "checkpoints")]

    def oldest_is_best(state: checkpoint.Snapshot) -> checkpoint.Snapshot:
        return checkpoint.Snapshot(
            state.model, state.optimizer, state.ema, state.meta | {"best": {"step": oldest, "accuracy": 1.0}}
        )

    change_states(run, oldest_is_best)
    assert formats.read(export_to(run, tmp_path)).facts.step == oldest < newest
    assert f"step {oldest}, ema weights" in capsys.readouterr().out
    (run / "checkpoints" / f"step-{oldest:08d}" / "ema.safetensors").write_bytes(b"x")
    assert formats.read(export_to(run, tmp_path)).facts.step == newest
    assert "ema.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "run/export/model.safetensors"),
        (["--format", "onnx"], "run/export/model.onnx"),
        (["--output", "{}/a/b.onnx"], "a/b.onnx"),
        (["--output", "{}/a"], "a/model.safetensors"),
        (["--output", "{}", "--format", "onnx"], "model.onnx"),
    ],
)
def test_export_writes_the_requested_file_and_nothing_else(
    flags: list[str], name: str, run: Path, tmp_path: Path
) -> None:
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["export", str(run), *(flag.format(tmp_path) for flag in flags)]) == 0
    new = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} - {
        str(path.relative_to(tmp_path)) for path in before
    }
    assert new == {name, f"{name}.md"}


@pytest.mark.parametrize(("offset", "wrong"), [(0.3, ""), (float("nan"), " 359 of 359")])
def test_file_that_predicts_something_else_is_void(
    offset: float,
    wrong: str,
    digits_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = formats.write

    def other(deployed: formats.Deployed, path: Path) -> None:
        tensors = {name: tensor + offset for name, tensor in checkpoint.model_tensors(deployed.logits).items()}  # type: ignore
        facts = formats.dataclasses.replace(deployed.facts, weights_sha256=checkpoint.tensors_sha256(tensors))
        write(formats.Deployed(facts, formats.build(facts, tensors, None)), path)

    monkeypatch.setattr(formats, "write", other)
    message = refusal([digits_run, "--output", tmp_path / "m.safetensors"], capsys, code=1)
    assert f"{wrong or 'of 359'} images other than its checkpoint" in message
    assert list(tmp_path.iterdir()) == []


def test_other_numbers_than_the_run_recorded_are_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole checkpoint whose run recorded another count is exported with both numbers."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row["event"] == "eval"]
    correct = evaluations[-1]["correct"]
    for row in evaluations:
        row["correct"] -= 30
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    newest = checkpoint.directories(run / "checkpoints")[0]
    path = export_to(run, run / "export", "safetensors", "--checkpoint", str(newest))
    warning = f"warning: {correct} of 359 predictions are right, but the run recorded {correct - 30} at this step."
    assert capsys.readouterr().err == f"{warning}\n"
    assert f"recorded {correct - 30} right ones" in path.with_name(f"{path.name}.md").read_text()


def test_run_on_the_fallback_data_is_verified_on_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The config of such a run names the missing data."""
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("data:\n  name: digits", "data:\n  name: kmnist"))
    assert "kmnist" in refusal([run, "--", "--data.download", "false"], capsys)
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(rows.replace('"is_fallback": false', '"is_fallback": true'))
    export_to(run, run / "export")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_without_its_packages_names_what_to_install(
    package: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal([run, "--format", "onnx"], capsys)
    assert message == f'error: ONNX needs the package {package}: pip install "lockstep[export]".'


REFUSALS: dict[str, tuple[list[str], str]] = {
    "no run": (["{}/absent"], "config.yaml is missing"),
    "not a run": (["{}"], "config.yaml is missing"),
    "format": (["{}/run", "--format", "onyx"], "Did you mean onnx?"),
    "option": (["{}/run", "--ouput", "x"], "Did you mean --output?"),
    "weights": (["{}/run", "--weights", "emma"], "Did you mean ema?"),
    "suffix": (["{}/run", "--output", "{}/m.pickle"], "ends in .safetensors or .onnx"),
    "suffix of another format": (["{}/run", "--format", "onnx", "--output", "{}/m.safetensors"], "ends in .onnx"),
    "checkpoint": (["{}/run", "--checkpoint", "{}/absent"], "absent is not whole"),
    "output in a file": (["{}/run", "--output", "{}/run/config.yaml/m.onnx"], "cannot be written"),
    "train argument": (["{}/run", "--", "--optim.lrr", "1"], "Did you mean optim.lr?"),
    "other data": (["{}/run", "--", "--data.name", "random"], "The data are not the run's"),
    "data": (["{}/run", "--", "--data.name", "kmnist", "--data.download", "false"], "kmnist not found"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_export_refuses_in_one_line(case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, words = REFUSALS[case]
    assert words in refusal([argument.format(tmp_path) for argument in argv], capsys)
    assert not [path for suffix in SUFFIXES.values() for path in tmp_path.rglob(f"m*{suffix}") if path.stem == "m"]


def test_run_without_averages_or_checkpoints_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_states(run, lambda state: checkpoint.Snapshot(state.model, state.optimizer, {}, state.meta))
    assert "Use --weights raw" in refusal([run, "--weights", "ema"], capsys)
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint" in refusal([run], capsys)


@pytest.mark.parametrize("name", ["export", "predict"])
def test_help_imports_neither_torch_nor_numpy(name: str, python: Callable) -> None:
    code = "import sys; from launch.__main__ import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    done = python("-c", code, name, "--help")
    assert done.returncode == 0, done.stderr
    assert {"torch", "numpy", "PIL"} & set(done.stdout.split()) == set()


def test_command_line_exports_and_predicts(digits_run: Path, tmp_path: Path, python: Callable) -> None:
    """This starts both programs as a user does."""
    from PIL import Image

    Image.fromarray(images_of_the_test_split()[0, 0].numpy()).save(tmp_path / "0.png")
    done = python("-m", "launch", "export", str(digits_run), "--output", str(tmp_path / "m.safetensors"))
    assert (done.returncode, done.stderr) == (0, "")
    done = python("-m", "launch", "predict", str(tmp_path / "m.safetensors"), str(tmp_path / "0.png"), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = json.loads(done.stdout)
    assert row["label"] == str(data.prepare(DataConfig(name="digits"))[0].tensors["test_labels"][0].item())
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    assert np.argmax(list(row["probabilities"].values())) == int(row["label"])

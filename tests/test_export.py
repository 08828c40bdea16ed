"""train.export and train.deploy: one file that says what it is, gives the checkpoint's predictions, and unpickles nothing."""

import json
import pickle  # noqa: TID251  to show that it is never used
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from train import checkpoint, data, deploy, export
from train.checkpoint import Damaged
from train.config import DataConfig, UserError
from train.deploy import SUFFIXES, from_run

KINDS = list(SUFFIXES)


def exported(run: Path, folder: Path, kind: str = "safetensors", *flags: str) -> Path:
    """Export a run into a folder; return the file."""
    assert export.main([str(run), "--format", kind, "--output", str(folder), *flags]) == 0
    return folder / f"model{SUFFIXES[kind]}"


@pytest.fixture(scope="module")
def files(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run of the fixture, exported to each format."""
    folder = tmp_path_factory.mktemp("files")
    folder.mkdir(exist_ok=True)
    return {kind: exported(digits_run, folder, kind) for kind in KINDS}


@pytest.fixture
def copies(files: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Exported files that a test may damage."""
    return {kind: Path(shutil.copy(path, tmp_path)) for kind, path in files.items()}


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return shutil.copytree(digits_run, tmp_path / "run")


def refusal(argv: list[Any], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Export what must be refused -> the one line."""
    assert export.main([str(argument) for argument in argv]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def images_of_the_test_split() -> torch.Tensor:
    return data.prepare(DataConfig(name="digits"))[0]["t10k_images"][:, None]


def best_step(run: Path) -> int:
    return json.loads((run / "summary.json").read_text())["best"]["step"]


@pytest.mark.parametrize("kind", KINDS)
def test_file_gives_the_checkpoints_logits(kind: str, files: dict[str, Path], digits_run: Path) -> None:
    original = from_run(digits_run, pytest.fail)
    for own in (False, True):
        found = deploy.read(files[kind], own=own)
        assert found.facts == original.facts
        torch.testing.assert_close(
            found.scores(images_of_the_test_split()), original.scores(images_of_the_test_split()), atol=1e-4, rtol=1e-4
        )
    assert original.facts.step == best_step(digits_run)
    assert (original.facts.weights, original.facts.data, original.facts.model) == ("ema", "digits", "tiny")


def test_files_are_read_by_others_with_what_they_say_of_themselves(files: dict[str, Path], digits_run: Path) -> None:
    """What the cards tell people to do, without this project's code."""
    with safetensors.safe_open(files["safetensors"], "pt") as file:
        facts = file.metadata()
    images = images_of_the_test_split()
    inputs = (images.float() - float(facts["mean"])) / float(facts["std"])
    wanted = from_run(digits_run, pytest.fail).scores(images)
    assert facts["model"] == "tiny"
    assert json.loads(facts["class_names"]) == list("0123456789")
    session = onnxruntime.InferenceSession(files["onnx"], providers=["CPUExecutionProvider"])
    assert {**facts}.items() <= session.get_modelmeta().custom_metadata_map.items()
    for some in (inputs, inputs[:1]):  # any number of images
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"inputs": some.numpy()})[0]), wanted[: len(some)])
        extra = {"lockstep.json": ""}
        program = torch.export.load(files["torch-export"], extra_files=extra).module()
        torch.testing.assert_close(program(some), wanted[: len(some)])
        assert json.loads(extra["lockstep.json"]) == facts
    weights = load_file(files["safetensors"])
    assert checkpoint.tensors_sha256(weights) == facts["weights_sha256"]


@pytest.mark.parametrize("kind", KINDS)
def test_card_says_data_accuracy_commit_and_config(kind: str, files: dict[str, Path], digits_run: Path) -> None:
    card = files[kind].with_name(f"{files[kind].name}.md").read_text()
    summary = json.loads((digits_run / "summary.json").read_text())
    correct = round(summary["best"]["accuracy"] * 359)
    words = (
        f"({correct} of 359)", summary["data"]["sha256"], deploy.read(files[kind]).facts.weights_sha256, "3,786 parameters",
        f"step {summary['best']['step']} of run `digits`", str(summary["git_commit"] or "unknown"), "optim.lr: 0.05",
        files[kind].name, "gives the checkpoint's prediction for each of 359", f"{files[kind].stat().st_size:,} bytes",
    )  # fmt: skip
    assert [word for word in words if word not in card] == []
    assert "{" not in card.split("## Use")[0]


def test_raw_weights_and_another_checkpoint_are_taken_when_asked(digits_run: Path, tmp_path: Path) -> None:
    newest = checkpoint.directories(digits_run / "checkpoints")[0]
    path = exported(digits_run, tmp_path, "safetensors", "--weights", "raw", "--checkpoint", str(newest))
    facts = deploy.read(path).facts
    assert (facts.weights, facts.step) == ("raw", checkpoint.step_of(newest))
    assert facts.weights_sha256 == json.loads((digits_run / "summary.json").read_text())["weights_sha256"]


def change_states(run: Path, change: Callable[[checkpoint.State], checkpoint.State]) -> None:
    """Write all checkpoints of a run anew, each a whole one."""
    for path in checkpoint.directories(run / "checkpoints"):
        state = change(checkpoint.decode(checkpoint.read(path)))
        shutil.rmtree(path)
        checkpoint.write(path.parent, checkpoint.step_of(path), checkpoint.encode(state))


def test_best_checkpoint_is_taken_and_the_newest_where_it_is_damaged(run: Path, tmp_path: Path, capsys: Any) -> None:
    newest, *_, oldest = [checkpoint.step_of(path) for path in checkpoint.directories(run / "checkpoints")]

    def oldest_is_best(state: checkpoint.State) -> checkpoint.State:
        return checkpoint.State(state.model, state.optimizer, state.ema, state.meta | {"best": {"step": oldest, "accuracy": 1.0}})

    change_states(run, oldest_is_best)
    assert deploy.read(exported(run, tmp_path)).facts.step == oldest < newest
    assert f"step {oldest}, ema weights" in capsys.readouterr().out
    (run / "checkpoints" / f"step-{oldest:08d}" / "ema.safetensors").write_bytes(b"x")
    assert deploy.read(exported(run, tmp_path)).facts.step == newest
    assert "ema.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "run/export/model.safetensors"),
        (["--format", "torch-export"], "run/export/model.pt2"),
        (["--output", "{}/a/b.pt2"], "a/b.pt2"),
        (["--output", "{}", "--format", "torch-export"], "model.pt2"),
    ],
)
def test_file_lands_where_output_says_and_nothing_else_stays(flags: list[str], name: str, run: Path, tmp_path: Path) -> None:
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert export.main([str(run), *(flag.format(tmp_path) for flag in flags)]) == 0
    new = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} - {
        str(path.relative_to(tmp_path)) for path in before
    }
    assert new == {name, f"{name}.md"}


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
    path = exported(digits_run, tmp_path, kind)
    deploy.read(path)
    if kind == "torch-export":
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            assert [size for name, size in sizes.items() if name.endswith((".pt", ".pkl"))] == [0]  # the sample inputs: none
            configs = [archive.read(name).decode() for name in sizes if name.endswith("config.json")]
        assert len(configs) == 2
        assert not any('"use_pickle": true' in config for config in configs)


def test_pt2_of_a_stranger_runs_no_program(copies: dict[str, Path], tmp_path: Path) -> None:
    """A pickle and a broken program inside a .pt2 are not looked at: only weights and facts are read."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "owned").touch, ())

    evil = tmp_path / "evil.pt2"
    with zipfile.ZipFile(copies["torch-export"]) as old, zipfile.ZipFile(evil, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            content = pickle.dumps(Evil()) if name.endswith("model.pt") else b"{}" if name.endswith("model.json") else content
            new.writestr(name, content)
    assert deploy.read(evil).scores(images_of_the_test_split()).shape == (359, 10)
    assert not (tmp_path / "owned").exists()


def test_file_that_predicts_something_else_is_void(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = deploy.write

    def other(deployed: deploy.Deployed, kind: str, path: Path) -> None:
        tensors = {name: tensor + 0.3 for name, tensor in checkpoint.model_tensors(deployed.logits).items()}  # type: ignore
        facts = deploy.dataclasses.replace(deployed.facts, weights_sha256=checkpoint.tensors_sha256(tensors))
        write(deploy.Deployed(facts, deploy.build(facts, tensors)), kind, path)

    monkeypatch.setattr(deploy, "write", other)
    message = refusal([digits_run, "--output", tmp_path / "m.safetensors"], capsys, code=1)
    assert "of 359 images other than its checkpoint" in message
    assert list(tmp_path.iterdir()) == []


def change_json(path: Path, change: Callable[[dict], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_checkpoint_that_predicts_other_than_its_run_did_is_not_exported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = checkpoint.directories(run / "checkpoints")[0]
    flags = [run, "--checkpoint", newest]
    change_json(run / "summary.json", lambda summary: summary.update(ema_test_predictions_sha256="0" * 64))
    message = refusal(flags, capsys, code=1)
    assert "summary.json says 000000000000" in message
    assert not (run / "export").exists()
    change_json(run / "summary.json", lambda summary: summary["contract"].update(num_threads=64))
    assert export.main([str(flag) for flag in flags]) == 0
    assert "num_threads 64 -> " in capsys.readouterr().out


def test_metrics_that_count_otherwise_are_noticed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        if row["event"] == "eval":
            row["correct"] -= 1
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert "metrics.jsonl says" in refusal([run], capsys, code=1)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_without_its_packages_says_what_to_install(
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
    "suffix": (["{}/run", "--output", "{}/m.pickle"], "ends in .pickle"),
    "suffix of another format": (["{}/run", "--format", "onnx", "--output", "{}/m.pt2"], "is no onnx file"),
    "checkpoint": (["{}/run", "--checkpoint", "{}/absent"], "absent is not whole"),
    "output in a file": (["{}/run", "--output", "{}/run/config.yaml/m.pt2"], "cannot be written"),
    "train argument": (["{}/run", "--", "--optim.lrr", "1"], "Did you mean optim.lr?"),
    "data": (["{}/run", "--", "--data.name", "kmnist", "--data.download", "false"], "kmnist cannot be had"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_export_refuses_in_one_line(case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, words = REFUSALS[case]
    assert words in refusal([argument.format(tmp_path) for argument in argv], capsys)
    assert not list(tmp_path.rglob("*.pt2"))


def test_run_without_averages_or_checkpoints_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_states(run, lambda state: checkpoint.State(state.model, state.optimizer, {}, state.meta))
    assert "Use --weights raw" in refusal([run, "--weights", "ema"], capsys)
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint" in refusal([run], capsys)


def metadata(**changes: str | None) -> Callable[[Path], None]:
    """A damage of a safetensors file's metadata; None removes an entry."""

    def damage(path: Path) -> None:
        with safetensors.safe_open(path, "pt") as file:
            facts = {**file.metadata(), **changes}
        save_file(load_file(path), path, {name: value for name, value in facts.items() if value is not None})

    return damage


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 64
    path.write_bytes(bytes(content))


def weights_of(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path, {"weights_sha256": checkpoint.tensors_sha256(tensors)})


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    """A damage of a .pt2: one entry of the zip has another content."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            entries = {entry: archive.read(entry) for entry in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for entry, old in entries.items():
                archive.writestr(entry, content if entry.endswith(name) else old)

    return damage


DAMAGES: list[tuple[str, str, Callable[[Path], Any], str]] = [
    *[(kind, "empty", lambda path: path.write_bytes(b""), "model") for kind in KINDS],
    *[(kind, "half", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "model") for kind in KINDS],
    *[(kind, "text", lambda path: path.write_text("<html>404</html>"), "model") for kind in KINDS],
    *[(kind, "zeros", lambda path: path.write_bytes(bytes(4096)), "model") for kind in KINDS],
    *[(kind, "pickle", lambda path: path.write_bytes(pickle.dumps({"a": 1})), "model") for kind in KINDS],
    *[(kind, "directory", lambda path: (path.unlink(), path.mkdir()), "") for kind in KINDS],
    ("safetensors", "flipped weight", lambda path: flip(path, -5), "damaged: its weights have SHA-256"),
    ("safetensors", "huge header", lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]), "not a whole safetensors"),
    ("safetensors", "no metadata", lambda path: save_file(load_file(path), path), "lack 'model'"),
    ("safetensors", "unknown model", metadata(model="resnet"), "lack a known model"),
    ("safetensors", "no mean", metadata(mean=None), "lack 'mean'"),
    ("safetensors", "mean of words", metadata(mean="many"), "lack"),
    ("safetensors", "std 0", metadata(std="0"), "lack mean and std"),
    ("safetensors", "std NaN", metadata(std="NaN"), "lack mean and std"),
    ("safetensors", "nine classes", metadata(class_names="[" + ", ".join('"a"' for _ in range(9)) + "]"), "lack 10 class_names"),
    ("safetensors", "classes are numbers", metadata(class_names=str(list(range(10)))), "lack 10 class_names"),
    ("safetensors", "deep config", metadata(config="[" * 100_000), "lack"),
    ("safetensors", "another model", metadata(model="cnn"), "not this model's"),
    ("safetensors", "foreign weights", weights_of({"a": torch.zeros(3)}), "lack"),
    ("torch-export", "no facts", replaced("lockstep.json", b""), "not a whole .pt2"),
    ("torch-export", "facts are a list", replaced("lockstep.json", b"[]"), "lack"),
    ("torch-export", "deep facts", replaced("lockstep.json", b"[" * 100_000), "not a whole .pt2"),
    ("torch-export", "short weight", replaced("weight_4", bytes(8)), "not a whole .pt2"),
    ("torch-export", "zero weight", replaced("weight_1", bytes(16)), "damaged: its weights have SHA-256"),
    ("torch-export", "no weights", replaced("model_weights_config.json", b"{}"), "not a whole .pt2"),
    ("onnx", "flipped weight", lambda path: flip(path, path.read_bytes().find(b"conv1.weight") + 60), "onnx"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "case", "damage", "words"), DAMAGES, ids=[f"{kind}-{case}" for kind, case, *_ in DAMAGES])
def test_damaged_file_is_refused_in_one_line(
    kind: str, case: str, damage: Callable[[Path], Any], words: str, copies: dict[str, Path]
) -> None:
    damage(copies[kind])
    with pytest.raises(UserError) as error:
        deploy.read(copies[kind])
    assert str(copies[kind]) in str(error.value) or isinstance(error.value, Damaged)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_command_line_exports_and_predicts(digits_run: Path, tmp_path: Path, python: Callable) -> None:
    """The two programs as a person starts them."""
    from PIL import Image

    Image.fromarray(images_of_the_test_split()[0, 0].numpy()).save(tmp_path / "0.png")
    done = python("-m", "train.export", str(digits_run), "--output", str(tmp_path / "m.safetensors"))
    assert (done.returncode, done.stderr) == (0, "")
    done = python("-m", "train.predict", str(tmp_path / "m.safetensors"), str(tmp_path / "0.png"), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = json.loads(done.stdout)
    assert row["label"] == str(data.prepare(DataConfig(name="digits"))[0]["t10k_labels"][0].item())
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    assert np.argmax(list(row["probabilities"].values())) == int(row["label"])

"""Malformed checkpoints are refused in one line and kept. Damaged records are written again."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal
from ranks.processes import Ranks, arguments, train
from test_checkpoint import DAMAGES

from train.__main__ import main
from train.storage import checkpoint

# Checkpoints that verify but do not belong to this run. Checksums do not prove where a file is from.


def meta(**changes: Any) -> Callable[[checkpoint.Snapshot], checkpoint.Snapshot]:
    """Return a change of the values in the JSON file; `...` removes one."""

    def change(state: checkpoint.Snapshot) -> checkpoint.Snapshot:
        kept = {name: value for name, value in {**state.meta, **changes}.items() if value is not ...}
        return dataclasses.replace(state, meta=kept)

    return change


def model(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[checkpoint.Snapshot], checkpoint.Snapshot]:
    """Return a change of the model's tensors, in place."""

    def changed(state: checkpoint.Snapshot) -> checkpoint.Snapshot:
        change(state.model)
        return state

    return changed


def optimizer(tensors: dict[str, torch.Tensor]) -> Callable[[checkpoint.Snapshot], checkpoint.Snapshot]:
    return lambda state: dataclasses.replace(state, optimizer={**state.optimizer, **tensors})


STATES: dict[str, Callable[[checkpoint.Snapshot], checkpoint.Snapshot]] = {
    "step is text": meta(step="4"),
    "step is negative": meta(step=-1),
    "step is beyond the end": meta(step=10**30),
    "step is true": meta(step=True),
    "no trajectory": meta(trajectory=...),
    "trajectory is a list": meta(trajectory=[1]),
    "no ledger": meta(ledger=...),
    "ledger is text": meta(ledger="0"),
    "ledger of texts": meta(ledger={"sum": "x", "count": 1}),
    "no best": meta(best=...),
    "best is a number": meta(best=3),
    "best without accuracy": meta(best={"step": 1}),
    "no environment": meta(environment=...),
    "no data": meta(sha256=...),
    "data is a number": meta(sha256={"data": 7}),
    "other data": meta(sha256={"data": "0" * 64}),
    "no scaler": meta(scaler=...),
    "model lacks a tensor": model(lambda tensors: tensors.pop("fc2.bias")),
    "model has one more": model(lambda tensors: tensors.update(extra=torch.zeros(3))),
    "model of another shape": model(lambda tensors: tensors.update({"fc2.bias": torch.zeros(11)})),
    "no averaged weights": lambda state: dataclasses.replace(state, ema={}),
    "optimizer of another model": optimizer({"fc9.weight/momentum_buffer": torch.zeros(3)}),
    "optimizer tensor without a key": optimizer({"momentum": torch.zeros(3)}),
}
BYTES = [case for case in DAMAGES if "optimizer" not in case and "ema" not in case][::2]
FAST = "--train.max_steps 4 --optim.ema 0.9 --checkpoint.every_steps 2 --train.global_batch_size 64"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad") / "run"
    train(1, path, FAST)
    shutil.rmtree(path / "checkpoints" / "step-00000004")
    return path


def damaged(run: Path, case: str, path: Path) -> Path:
    """Copy the run and damage its only checkpoint."""
    shutil.copytree(run, path)
    only = path / "checkpoints" / "step-00000002"
    if case in STATES:
        state = STATES[case](checkpoint.decode(checkpoint.read(only)))
        shutil.rmtree(only)
        checkpoint.write(path / "checkpoints", 2, checkpoint.encode(state), path.parent)
    else:
        DAMAGES[case][1](only)
    return path


@pytest.mark.parametrize("case", [*STATES, *BYTES])
def test_malformed_checkpoint_is_refused_and_kept(
    case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(run, case, tmp_path / "run")
    before = sorted(file.relative_to(path) for file in path.rglob("*"))
    assert str(path / "checkpoints") in refusal(arguments(path, FAST), capsys)
    assert sorted(file.relative_to(path) for file in path.rglob("*")) == before


@pytest.mark.parametrize("case", ["no ledger", "optimizer of another model", BYTES[0]])
def test_malformed_checkpoint_ends_two_ranks(case: str, run: Path, tmp_path: Path) -> None:
    path = damaged(run, case, tmp_path / "run")
    ranks = Ranks(2, arguments(path, FAST), tmp_path / "logs")
    assert ranks.wait() == [2, 2]
    assert ranks.output().count("error: ") == 1
    assert "Traceback" not in ranks.output()


RUN_FILES = {
    "metrics.jsonl": [b"", b"\xff\xfe\0", b"3\n[]\nnull\n{}\n", b'{"event": "train"}\n', b"[" * 100_000, b"{" * 1000],
    "summary.json": [b"", b"\xff\xfe\0", b"[]", b"{}", b"[" * 100_000, b'{"outcome": "finished"}'],
    "config.yaml": [b"", b"\xff\xfe\0", b"a: &a [x]\nb: [*a]\n"],
}


@pytest.mark.parametrize(
    ("name", "number"), [(name, at) for name, contents in RUN_FILES.items() for at in range(len(contents))]
)
def test_run_with_damaged_records_resumes(name: str, number: int, run: Path, tmp_path: Path) -> None:
    """Records are not part of the state. The log starts again, the summary and the config are written again."""
    path = shutil.copytree(run, tmp_path / "run")
    (path / name).write_bytes(RUN_FILES[name][number])
    assert main(arguments(path, FAST)) == 0
    assert (path / "checkpoints" / "step-00000004").is_dir()


@pytest.mark.parametrize("world_size", [1, 2])
def test_run_directory_that_cannot_be_made_is_refused(world_size: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ranks = Ranks(world_size, arguments(tmp_path / "file" / "run", FAST), tmp_path / "logs")
    assert set(ranks.wait()) == {2}
    assert "cannot be written: Not a directory" in ranks.output()
    assert "Traceback" not in ranks.output()


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_that_cannot_be_read_are_refused_on_every_rank(world_size: int, run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(run, tmp_path / "run")
    (path / "metrics.jsonl").unlink()
    (path / "metrics.jsonl").mkdir()
    ranks = Ranks(world_size, arguments(path, FAST), tmp_path / "logs")
    assert set(ranks.wait()) == {2}
    assert "metrics.jsonl cannot be read: Is a directory" in ranks.output()
    assert "Traceback" not in ranks.output()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("resume", ["auto", "its path"])
def test_checkpoint_of_another_version_is_refused_and_its_version_named(
    world_size: int, resume: str, run: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(run, tmp_path / "run")
    saved = path / "checkpoints" / "step-00000002"
    (saved / "manifest.json").write_text(json.dumps({"schema": 1, "sha256": {}}))
    flags = f"{FAST} --run.resume {saved if resume == 'its path' else resume}"
    ranks = Ranks(world_size, arguments(path, flags), tmp_path / "logs")
    assert set(ranks.wait()) == {2}
    (line,) = [line for line in ranks.output().splitlines() if line.startswith("error: ")]
    assert "has format 1, not 3: lockstep 0.1 wrote it" in line
    assert "Traceback" not in ranks.output()

"""An automatic name is of one start: no id that is older than it, or that others have, joins two runs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from ranks.processes import arguments, rows

from train.cli import parse
from train.errors import UserError
from train.rundir import RunDir, reserve
from train.tracking import wandb
from train.world.launcher import choose_name

Python = Callable[..., subprocess.CompletedProcess[str]]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_runs_started_in_the_same_second_have_directories_of_their_own(tmp_path: Path) -> None:
    argv = arguments(tmp_path / "x", "--train.max_steps 1")
    argv.remove("--run.name")
    argv.remove("x")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    frozen = "import sys, time; time.strftime = lambda *_: 'now'; from train.__main__ import main; "
    command = (sys.executable, "-c", f"{frozen} sys.exit(main(sys.argv[1:]))", *argv)
    started = [subprocess.Popen(command, cwd=ROOT, env=env) for _ in range(3)]
    assert [process.wait(100) for process in started] == [0, 0, 0]
    assert names(tmp_path) == ["digits-now", "digits-now-2", "digits-now-3"]


STARTS = {
    "a notebook in a Slurm step": {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"},
    "a shell in a trial of a sweep": {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "7.0"},
}


@pytest.mark.parametrize("start", STARTS)
def test_second_training_under_an_older_id_does_not_join_the_first(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--run.dir", str(tmp_path), "--data.name", "digits"]
    for name, value in STARTS[start].items():
        monkeypatch.setenv(name, value)
    assert choose_name(parse(argv), argv) == "digits-7.0"
    assert choose_name(parse(argv), argv) == "digits-7.0-2"


@pytest.mark.parametrize(
    "restart",
    [
        {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"},
        {"TORCHELASTIC_RUN_ID": "7.0", "TORCHELASTIC_RESTART_COUNT": "1"},
        {"TORCHELASTIC_RUN_ID": "7.0"},  # of a pod that was started again
    ],
)
def test_restart_finds_its_run(restart: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--run.dir", str(tmp_path), "--data.name", "digits"]
    row = {"event": "start", "step": 0, "command": argv}
    (tmp_path / reserve(tmp_path, "digits-7.0") / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for name, value in restart.items():
        monkeypatch.setenv(name, value)
    assert choose_name(parse(argv), argv) == "digits-7.0"


@pytest.mark.parametrize("launcher", ["srun", "launch run"])
@pytest.mark.parametrize(
    "restart", [{"SLURM_RESTART_COUNT": "1"}, {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "1"}]
)
def test_restart_finds_its_own_run_among_those_of_an_id(
    restart: dict[str, str], launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that trains two seeds in one Slurm step, and is requeued."""
    for name, value in STARTS["a notebook in a Slurm step"].items():
        monkeypatch.setenv(name, value)
    commands = [["--run.dir", str(tmp_path), "--data.name", "digits", "--seed", seed] for seed in "123"]
    for argv in commands[:2]:
        name = choose_name(parse(argv), argv)
        command = [*argv, "--run.name", name] if launcher == "launch run" else argv
        row = {"event": "start", "step": 0, "command": command}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for name, value in restart.items():
        monkeypatch.setenv(name, value)
    names = [choose_name(parse(argv), argv) for argv in commands]
    assert names == ["digits-7.0", "digits-7.0-2", "digits-7.0-3"]


@pytest.mark.parametrize("place", ["link", "link/runs", "file", "file/runs"])
def test_directory_that_cannot_be_made_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/purged/runs")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        reserve(tmp_path / place, "x")


@pytest.mark.parametrize("identity", ["../../../out", "a/b", "a b", "\n", "x" * 250])
@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "WANDB_RUN_ID"])
def test_id_obeys_the_rule_of_names(
    variable: str, identity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, identity)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    if variable == "TORCHELASTIC_RUN_ID":
        monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    argv = ["--run.dir", str(tmp_path / "runs")]
    with pytest.raises(UserError, match=r"run\.name is .*Use 1 to 200"):
        choose_name(parse(argv), argv)
    assert names(tmp_path) == []


@pytest.mark.parametrize("stem", ["my recipe (2)", ".hidden", "\u00fcben", "x" * 240, "---"])
def test_recipe_of_any_name_can_be_trained(stem: str, tmp_path: Path) -> None:
    recipe = tmp_path / f"{stem}.yaml"
    recipe.write_text("seed: 1\n")
    argv = ["--config", str(recipe), "--run.dir", str(tmp_path / "runs")]
    assert (
        names(tmp_path / "runs")
        if (name := choose_name(parse(argv), argv)) is None
        else [name] == names(tmp_path / "runs")
    )


def test_sweep_without_a_run_id_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    argv = ["--run.dir", str(tmp_path)]
    assert choose_name(parse(argv), argv).startswith("mnist-20")


def test_second_run_of_a_trial_has_a_wandb_id_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "trial")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (wandb.wandb_id(RunDir(tmp_path / name)) for name in ("a", "b"))
    assert first == wandb.wandb_id(RunDir(tmp_path / "a")) == "trial"
    assert second == wandb.wandb_id(RunDir(tmp_path / "b")) != "trial"


def test_run_whose_checkpoints_are_gone_is_refused_and_kept(tmp_path: Path, python: Python) -> None:
    run = tmp_path / "run"
    argv = arguments(run, "--train.max_steps 5 --log.every_steps 1")
    assert python("-m", "train", *argv).returncode == 0
    shutil.rmtree(run / "checkpoints")
    before = rows(run)
    for resume in ("auto", "never"):
        done = python("-m", "train", *argv, "--run.resume", resume)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert rows(run) == before
    assert (run / "summary.json").exists()


def test_longer_training_is_refused_with_what_works(tmp_path: Path, python: Python) -> None:
    argv = arguments(tmp_path / "run", "--train.epochs 1")
    assert python("-m", "train", *argv).returncode == 0
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    longer = [*argv, "--train.epochs", "2", "--run.name", "longer"]
    done = python("-m", "train", *longer, "--run.resume", str(checkpoint))
    assert done.returncode == 2
    advice = f"--model.weights {checkpoint}/model.safetensors"
    assert advice in done.stderr
    assert python("-m", "train", *longer, *advice.split()).returncode == 0


def test_epochs_next_to_max_steps_are_not_compared(tmp_path: Path, python: Python) -> None:
    argv = arguments(tmp_path / "run", "--train.max_steps 5")
    assert python("-m", "train", *argv).returncode == 0
    done = python("-m", "train", *argv, "--train.epochs", "7")
    assert done.returncode == 0
    assert "train.epochs has no effect, because train.max_steps is 5" in done.stdout

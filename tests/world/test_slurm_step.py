"""Odd and inherited variables of Slurm: one line at once, or the right ranks, and never a wait for absent ranks."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from train.config import TrainConfig
from train.world.launcher import Placement, slurm_variables
from train.world.world import choose_num_threads

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node1",
    "SLURM_STEP_TASKS_PER_NODE": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_NODEID": "3"},
        {"SLURM_STEP_NODELIST": None},
        {"SLURM_STEP_NODELIST": ""},
        {"SLURM_STEP_TASKS_PER_NODE": None},
        {"SLURM_STEP_TASKS_PER_NODE": "four"},
        {"SLURM_STEP_NUM_TASKS": "many"},
        {"SLURM_PROCID": None},
        {"SLURM_PROCID": "4"},
        {"SLURM_LOCALID": "4"},
    ],
    ids=str,
)
def test_odd_variables_are_one_line(change: dict[str, str | None]) -> None:
    env = {name: value for name, value in (os.environ | STEP | change).items() if value is not None}
    command = (sys.executable, "-m", "train", "--data.name", "digits", "--train.device", "cpu")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: Slurm's variables do not describe a task of a step: SLURM_PROCID ")
    (name, value), *_ = change.items()
    assert f"{name} {'is not set' if value is None else value}" in done.stderr


def test_prompt_of_an_interactive_step_is_one_process() -> None:
    """In `srun --pty -n 4 bash` the prompt is task 0. The other tasks were shells that have ended."""
    assert slurm_variables(STEP | {"SLURM_PTY_PORT": "40001"}) == {}


def test_step_that_was_started_at_a_prompt_has_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It inherits SLURM_PTY_PORT. Its tasks may be wrappers that start Python; they have no terminal."""

    def no_terminal(path: str, flags: int) -> int:
        raise OSError(6, "No such device or address")

    inherited = STEP | {"SLURM_PTY_PORT": "40001"}
    assert slurm_variables(inherited | {"SLURM_TASK_PID": str(os.getpid())})["WORLD_SIZE"] == "4"
    monkeypatch.setattr(os, "open", no_terminal)
    assert slurm_variables(inherited | {"SLURM_TASK_PID": "1"})["WORLD_SIZE"] == "4"


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 4),  # 16 cores, 4 ranks
        (STEP, 4),
        (STEP | {"SLURM_CPUS_PER_TASK": "8"}, 8),  # each task may be bound to 8 cores of its own
        (STEP | {"SLURM_CPUS_PER_TASK": "64"}, 16),
        ({"SLURM_CPUS_PER_TASK": "8"}, 4),  # `launch run` in a job: the variable is that of the job
    ],
)
def test_rank_uses_the_cpus_of_its_task(
    variables: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert choose_num_threads(TrainConfig(), Placement(0, 4, 0, 4)) == threads

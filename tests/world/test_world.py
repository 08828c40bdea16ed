"""train.world reads a launcher's variables and sets up this process."""

import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refusal

from train.__main__ import main
from train.cli import parse
from train.errors import UserError
from train.world.launcher import (
    SINGLE,
    Placement,
    choose_name,
    is_restart,
    rank_variables,
    read_placement,
    slurm_variables,
)

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
}


def test_rank_under_srun_gets_the_variables_of_torch() -> None:
    assert slurm_variables(STEP) == {
        "RANK": "6",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": str(15000 + 16 * 1234567 % 15000),
    }
    assert slurm_variables(STEP | {"SLURM_PROCID": "3", "SLURM_NODEID": "1"})["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("alone", "alone"),
        ("a,b", "a"),
        ("node[01-03,07],x", "node01"),
        ("gpu[7,9]", "gpu7"),
        ("rack[1-2]-n[04-05]", "rack1-n04"),
        ("n[1-2].site.org", "n1.site.org"),
    ],
)
def test_first_node_has_rank_0(nodes: str, first: str) -> None:
    assert slurm_variables(STEP | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_site_may_set_address_and_port() -> None:
    found = slurm_variables(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_port_differs_between_jobs_attempts_and_steps() -> None:
    changes = [{}, {"SLURM_JOB_ID": "1234568"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"}]
    assert len({slurm_variables(STEP | change)["MASTER_PORT"] for change in changes}) == 4


def test_port_differs_between_all_steps_that_the_batch_script_starts() -> None:
    """Without its count, step 4 of an attempt would have the port of the next attempt's step 0."""
    steps = [("0", "0"), ("0", "4"), ("1", "0"), ("1", "40"), ("2", "1")]
    found = [
        slurm_variables(STEP | {"SLURM_RESTART_COUNT": restart, "SLURM_STEP_ID": step, "LOCKSTEP_RESTART": str(number)})
        for number, (restart, step) in enumerate(steps)
    ]
    assert len({variables["MASTER_PORT"] for variables in found}) == len(steps)


def test_count_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_RESTART", "x")
    with pytest.raises(UserError, match="The launcher's LOCKSTEP_RESTART is x, expected a number"):
        is_restart()


def test_other_launchers_are_left_alone() -> None:
    assert slurm_variables({}) == {}
    assert rank_variables(STEP | SINGLE) == {}  # torchrun inside of srun
    assert slurm_variables(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}


def test_mpi_that_does_not_place_its_ranks_on_machines_is_refused() -> None:
    """A rank of Cray's launcher would train alone. Slurm's variables place a rank of `srun --mpi=pmi2`."""
    cray = {"PMI_RANK": "1", "PMI_SIZE": "4"}
    with pytest.raises(UserError, match="PMI_SIZE 4"):
        rank_variables(cray)
    assert rank_variables(cray | STEP)["WORLD_SIZE"] == "7"
    assert rank_variables({"PMI_RANK": "0", "PMI_SIZE": "1"}) == {}
    assert rank_variables(cray | SINGLE) == {}


def test_run_has_the_same_name_after_a_requeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--run.dir", str(tmp_path)]
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert read_placement().rank == 6
    assert choose_name(parse(argv), argv) == "mnist-1234567.0"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert choose_name(parse(argv), argv) == "mnist-1234567.0"
    monkeypatch.setenv("SLURM_PTY_PORT", "1")  # srun --pty bash: two commands at one prompt are two runs
    assert "1234567" not in choose_name(parse(argv), argv)


@pytest.mark.parametrize(("local_rank", "line"), [("0", f"error: rank 8 on {socket.gethostname()}: "), ("1", "")])
def test_error_that_only_another_machine_has_is_printed_there(
    local_rank: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before ranks are connected they cannot share an error. Rank 0 may have none, or wait for this rank."""
    place = {"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("train.__main__.OTHER_RANKS_WAIT_SECONDS", 0.0)
    assert main(["--config", "/only/on/other/machines.yaml"]) == 2
    found = capsys.readouterr().err
    assert found.startswith(line)
    assert found.count("\n") == bool(line)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's mallopt")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Freed tensors of all sizes stay in the process. The kernel would zero memory that it gets back."""
    program = """
import sys, torch
from train.world.process import tune_malloc
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
if sys.argv[1] == "kept":
    tune_malloc()
before = resident()
tensors = [torch.ones(size) for size in (10**5, 10**6, 10**7)]
del tensors
print(resident() - before)
"""
    root = Path(__file__).parents[2]
    left = [
        int(
            subprocess.run(
                [sys.executable, "-c", program, how], cwd=root, capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("kept", "given back")
    ]
    assert left[0] > 4 * 10**7 > 2 * left[1]


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "two"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    ],
)
def test_variables_that_describe_no_place_are_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = refusal([], capsys)
    for name, value in variables.items():
        assert f"{name}={value}" in line


def test_launcher_without_local_rank_starts_one_rank_per_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read_placement() == Placement(rank=1, world_size=2, local_rank=0, local_world_size=1)


def test_single_rank_needs_no_local_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """enroot's hook for images of PyTorch does not set it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert read_placement() == Placement(rank=0, world_size=1, local_rank=0, local_world_size=1)

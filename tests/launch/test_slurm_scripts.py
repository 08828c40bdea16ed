"""slurm/*.sbatch on a stub of Slurm: what other versions than the lab's set and print, and what is refused."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

FINISH = """mkdir -p runs/5; echo '{"outcome": "finished"}' >runs/5/summary.json"""
STUB = {
    "srun": f'printf "srun"; printf " %s" "${{@:1:7}}"; echo; env | grep ^SLURM_ | sort | sed "s/^/env /"; {FINISH}',
    "squeue": "echo COMPLETED",
    "scontrol": 'if [ "$2" = hostnames ]; then tr , "\\n" <<<"$3"; else echo "$DETAILS"; fi',
    "python": 'echo "runs/$SLURM_JOB_ID"',
}
H100 = "   Nodes={} CPU_IDs=0-31 Mem=0 GRES=gpu:h100:{}(IDX:0-3),gpu:a100:0(IDX:N/A),shard:8(8/8)\n"
JOB = "JobId=5 JobName=x\n   TresPerJob=gres/gpu:6\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "slurm").mkdir()
    for name, body in STUB.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for script in (ROOT / "slurm").glob("*.sbatch"):
        (tmp_path / "slurm" / script.name).write_text(script.read_text())
    return tmp_path


def batch(place: Path, script: str, *arguments: str, **variables: str) -> tuple[int, list[str]]:
    """Run a batch script as slurmd would; return its exit code and the lines of its log."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env |= {"PATH": f"{place}/bin:{env['PATH']}", "PYTHON": f"{place}/bin/python", "SLURM_JOB_ID": "5"}
    env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n1,n2", **variables}
    done = subprocess.run(
        ("bash", f"slurm/{script}", *arguments),
        cwd=place,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        # 20.11 sets no SLURM_NTASKS for --ntasks-per-node 4, and its srun gets the CPUs per task too
        (
            {"SLURM_NTASKS_PER_NODE": "4", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_CPUS_PER_TASK": "2"}
            | {"SLURM_JOB_CPUS_PER_NODE": "8(x2)"},
            "--ntasks=8 --ntasks-per-node=4 --cpus-per-task=2",
        ),
        ({"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}, "--ntasks=8 --ntasks-per-node=4"),
        (
            {"SLURM_NTASKS": "7", "SLURM_TASKS_PER_NODE": "4,3", "SLURM_JOB_CPUS_PER_NODE": "4,3"},
            "--ntasks=7 --distribution=arbitrary --nodelist=n1,n1,n1,n1,n2,n2,n2",
        ),
        # 24.05: GPUs with types, and SLURM_TRES_PER_TASK
        (
            {"SLURM_GPUS": "h100:6", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_CPUS_PER_NODE": "32,16"}
            | {"SLURM_CPUS_PER_GPU": "8", "DETAILS": JOB + H100.format("n1", 4) + H100.format("n2", 2)},
            "--ntasks=6 --distribution=arbitrary --nodelist=n1,n1,n1,n1,n2,n2 --cpus-per-task=8",
        ),
        (
            {"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}
            | {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1", "SLURM_CPUS_PER_TASK": "8"}
            | {"SLURM_JOB_CPUS_PER_NODE": "32(x2)", "DETAILS": JOB + H100.format("n1,n2", 4)},
            "--ntasks=8 --ntasks-per-node=4 --cpus-per-task=8",
        ),
        # a version whose scontrol prints no GPUs
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_CPUS_PER_NODE": "4(x2)"}, "--ntasks=8 --ntasks-per-node=4"),
        # Hyperthreads: 3 CPUs per task are 2 cores, of 2 CPUs each
        (
            {"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_CPUS_PER_TASK": "3"}
            | {"SLURM_JOB_CPUS_PER_NODE": "4(x2)"},
            "--ntasks=2 --ntasks-per-node=1 --cpus-per-task=3",
        ),
    ],
)
def test_srun_is_told_what_the_job_asked_for(place: Path, variables: dict[str, str], options: str) -> None:
    code, lines = batch(place, "train.sbatch", **variables)
    assert code == 0, lines
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert srun.startswith(f"srun --nodelist=n1,n2 --nodes=2 {options} --kill-on-bad-exit=0"), lines
    assert not any("warning" in line or "SLURM_TRES_PER_TASK" in line for line in lines)


def test_variables_of_another_job_do_not_reach_srun(place: Path) -> None:
    """Slurm 22.05 hands these on to a job that is submitted by hand from inside a step."""
    leaked = {"SLURM_NTASKS": "6", "SLURM_NPROCS": "6", "SLURM_NTASKS_PER_NODE": "3", "SLURM_GPUS_PER_TASK": "1"}
    leaked |= {
        "SLURM_GPUS": "6",
        "SLURM_CPU_BIND": "mask_cpu:1",
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_CPUS_PER_GPU": "9",
    }
    code, lines = batch(place, "train.sbatch", SLURM_TASKS_PER_NODE="1(x2)", SLURM_JOB_CPUS_PER_NODE="1(x2)", **leaked)
    assert code == 0
    assert any(
        line.startswith("srun --nodelist=n1,n2 --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill") for line in lines
    ), lines
    passed = {line.split("=")[0].removeprefix("env ") for line in lines if line.startswith("env ")}
    assert passed & leaked.keys() == {"SLURM_NTASKS", "SLURM_NPROCS"}  # --ntasks wins over these


def test_unknown_gpus_of_a_node_are_refused(place: Path) -> None:
    code, lines = batch(place, "train.sbatch", SLURM_GPUS="6", SLURM_GPUS_ON_NODE="4")
    assert code == 2
    assert lines == ["slurm: error: scontrol lists the GPUs of 2 nodes as ''. Use --gpus-per-node."]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"}, "no line 0"),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4"}, "no line 4"),
        ({"SLURM_ARRAY_TASK_ID": "4"}, "has 3 lines, and no line 4"),
        ({}, "a sweep needs sbatch --array"),
    ],
)
def test_no_task_of_an_array_trains_unless_each_has_a_line(place: Path, array: dict[str, str], words: str) -> None:
    """Otherwise a user who counts from 0 would train lines 1 to N - 1. An empty line is a run without overrides."""
    (place / "lines.txt").write_text("--seed 1\n\n--seed 3")
    code, lines = batch(place, "sweep.sbatch", "lines.txt", SLURM_ARRAY_JOB_ID="5", **array)
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("slurm: error: ")
    assert words in lines[0]


@pytest.mark.parametrize(("options", "line_end"), [("set -euo pipefail", "\n"), ("set -u", "\n"), ("", "\r\n")])
def test_site_env_does_not_change_the_scripts(place: Path, options: str, line_end: str) -> None:
    """Its shell options end with it. Its line ends may be Windows'."""
    lines = [options, f"PYTHON={place}/bin/python", "false", ""]
    (place / "slurm" / "site.env").write_bytes(line_end.join(lines).encode())
    code, log = batch(place, "train.sbatch")
    assert code == 0, log


def test_flags_with_windows_line_ends(place: Path) -> None:
    (place / "lines.txt").write_bytes(b"--seed 1 --model.name tiny\r\n--seed 2\r\n")
    (place / "bin" / "srun").write_text(f'#!/bin/bash\nprintf "<%s>" "$@"\n{FINISH}\n')
    code, lines = batch(place, "sweep.sbatch", "lines.txt", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="1")
    assert code == 0
    assert any("<--seed><1><--model.name><tiny><--run.name><line-1>" in line for line in lines), lines


@pytest.mark.parametrize("line", ["--wandb.notes it's", '--wandb.notes "a\\"b"'])
def test_line_with_broken_quotes_trains_nothing(place: Path, line: str) -> None:
    """Otherwise the task would train the recipe without the line."""
    (place / "lines.txt").write_text(f"--seed 1\n{line} --optim.lr 0.3\n")
    code, lines = batch(place, "sweep.sbatch", "lines.txt", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    assert code == 2
    assert lines == ["slurm: error: line 2 of lines.txt has a backslash, or a quote without its partner"]


def test_scripts_are_shell() -> None:
    for script in ("train.sbatch", "ranks.sbatch", "sweep.sbatch", "site.env.example"):
        assert subprocess.run(["bash", "-n", ROOT / "slurm" / script]).returncode == 0
    ignored = subprocess.run(["git", "check-ignore", "-q", "slurm/site.env"], cwd=ROOT, env=os.environ)
    assert ignored.returncode == 0

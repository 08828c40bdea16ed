"""Test `launch sweep`, and what `launch slurm` refuses or prints without a cluster. tests/slurm has a cluster."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from pages import make_evaluation, make_summary

from launch import slurm
from launch.sweep import table
from train.errors import UserError

SMALL = ["--data.name", "digits", "--model.name", "tiny", "--train.exact", "true", "--train.num_micro_batches", "8"]


def finished(run: Path, accuracies: dict[str, float], outcome: str = "finished") -> None:
    results = {name: replace(make_evaluation(), accuracy=accuracy) for name, accuracy in accuracies.items()}
    run.mkdir(parents=True)
    (run / "summary.json").write_text(make_summary(outcome=outcome, results=results).to_json())


def test_table_has_mean_and_standard_deviation(tmp_path: Path) -> None:
    finished(tmp_path / "seed-1", {"raw": 0.90})
    finished(tmp_path / "seed-2", {"raw": 0.10, "ema": 0.94})
    finished(tmp_path / "seed-3", {"raw": 0.5}, outcome="preempted")
    (tmp_path / "seed-4").mkdir()
    lines = table(tmp_path).splitlines()
    assert lines[-1] == "2 of 4 runs: mean 92.00% +- 2.83% (standard deviation)"
    assert [line.split()[:2] for line in lines[1:-1]] == [["seed-1", "90.00%"], ["seed-2", "94.00%"]] + [
        [f"seed-{n}", "not"] for n in (3, 4)
    ]


def test_damaged_summary_costs_one_line_of_the_table(tmp_path: Path) -> None:
    finished(tmp_path / "seed-1", {"raw": 0.90})
    (tmp_path / "seed-2").mkdir()
    (tmp_path / "seed-2" / "summary.json").write_text('{"schema": 1}')
    lines = table(tmp_path).splitlines()
    assert "summary.json cannot be read: it was written by" in lines[2]
    assert lines[-1] == "1 of 2 runs: mean 90.00%"


def test_table_of_nothing_is_refused(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="holds no runs"):
            table(directory)


def test_dry_run_prints_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "--wandb.notes=a 'b' \"c\" $(d)\ne,f"
    options = ["--nodes", "4", "--gpus-per-node", "2", "--time=1:00", "--no-requeue", "--signal=USR2@60", "--dry-run"]
    assert slurm.main([*options, "--", *SMALL, odd]) == 0
    wanted = shlex.split(
        "sbatch --parsable --nodes 4 --gpus-per-node 2 --time=1:00 --no-requeue --signal=USR2@60 slurm/train.sbatch"
    )
    assert shlex.split(capsys.readouterr().out) == [*wanted, *SMALL, odd]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--nodes 2-4", "--nodes 2-4 --no-kill slurm/train.sbatch --min-nodes=2"),  # --ntasks-per-node 1 would give 2
        (
            "--nodes 1-4 --ntasks-per-node 2",
            "--nodes 1-4 --ntasks-per-node 2 --no-kill slurm/train.sbatch --min-nodes=1",
        ),
        ("--nodes 4-4", "--nodes 4-4 --ntasks-per-node 1 slurm/train.sbatch"),
    ],
)
def test_only_a_range_of_nodes_lets_a_job_lose_some(
    capsys: pytest.CaptureFixture[str], options: str, wanted: str
) -> None:
    assert slurm.main([*options.split(), "--dry-run", "--", *SMALL]) == 0
    assert shlex.split(capsys.readouterr().out) == ["sbatch", "--parsable", *wanted.split(), *SMALL]


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ("--time=5", "--signal=USR2@60"),  # 300 s, as in the script: it would come in the first second
        ("-t1", "--signal=USR2@12"),
        ("--time=0:50", "--signal=USR2@10"),
        ("--time=0-0:10", "--signal=USR2@120"),
        ("--time=10:01", ""),
        ("--time=1:00:00", ""),
        ("--time=5 --signal=B:USR2@30", ""),
        ("--time=UNLIMITED", ""),
        ("--time=0", ""),  # no limit
    ],
)
def test_short_job_is_not_told_to_stop_when_it_starts(
    capsys: pytest.CaptureFixture[str], given: str, added: str
) -> None:
    assert slurm.main([*given.split(), "--dry-run", "--", *SMALL]) == 0
    assert f"{' '.join([given, *added.split()])} slurm/train.sbatch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        *((["--nodes", nodes, "--", *SMALL], f"--nodes is {nodes}. Use") for nodes in ("0", "0-2", "3-2", "2-", "two")),
        (["--nodes", "2-9", "--", *SMALL], "9 processes cannot share train.num_micro_batches 8"),
        (["--", *SMALL, "--seeed", "1"], "There is no config field seeed"),
        (["--nodes", "2", "--gpus-per-node", "8", "--", *SMALL], "16 processes cannot share train.num_micro_batches 8"),
        (["--time", "5", "--", *SMALL], "unexpected argument: '5'"),
        (["--gpus-per-node", "-1", "--", *SMALL], "--gpus-per-node is -1"),
        (["--sweep", "seeds", "--", *SMALL], "--sweep needs --array"),
        (["--sweep", "seeds", "--array=1-2", "--follow", "--", *SMALL], "cannot be followed"),
        (["--sweep", "nothing.txt", "--array=1-2", "--", *SMALL], "--sweep nothing.txt cannot be read"),
        (
            ["--sweep", "tests/launch/test_sweep.py", "--array=1-2", "--", *SMALL],
            "tests/launch/test_sweep.py, line 1: ",
        ),
        (["--array=1-2", "--", *SMALL], "--array=1-2 needs --sweep"),
        (["--print-run", "--", *SMALL], "--print-run is for the job"),
    ],
)
def test_refusals_are_one_line(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        slurm.main([*argv[: argv.index("--")], "--dry-run", *argv[argv.index("--") :]])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--train.num_micro_batches 2", "line 2: 3 processes cannot share"),
        ('--wandb.notes "a\\"b"', "line 2 has a backslash"),
        ("--seed 2\f--seed 3", "line 2 has a backslash or a control character"),
        ("--wandb.notes it's", "line 2: No closing quotation"),
    ],
)
def test_line_that_makes_no_run_of_so_many_ranks_is_refused(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "lines").write_text(f"--seed 1\n{line}\n")
    options = ["--sweep", f"{tmp_path}/lines", "--array=1-2", "--nodes", "3", "--dry-run"]
    with pytest.raises(UserError, match=words):
        slurm.main([*options, "--", *SMALL])


def test_follow_waits_for_a_silent_controller_and_then_leaves_the_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my log").write_text("step 1\n")
    job = f"JobState={{}} Reason=None ExitCode=0:0 StdOut={tmp_path}/my log"
    states = ("RUNNING", "SIGNALING", "STAGE_OUT", "COMPLETED")  # a state that we do not know is no end
    answers = iter(text for state in states for text in ("", job.format(state)))

    def run(*command: str) -> str:
        if answer := next(answers, ""):
            return answer
        raise UserError("scontrol says: Unable to contact slurm controller")

    monkeypatch.setattr(slurm, "run", run)
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.01)
    assert slurm.follow("7") == 0
    assert capsys.readouterr().out.count("step 1") == 1
    monkeypatch.setattr(slurm, "PATIENCE_SECONDS", 0.05)
    assert slurm.follow("7") == slurm.LOST

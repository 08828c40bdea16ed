"""`launch slurm` passes on what asks for ranks, CPUs and GPUs, and refuses what contradicts itself."""

from pathlib import Path

import pytest

from launch import slurm
from train.errors import UserError

SMALL = ["--data.name", "digits", "--model.name", "tiny", "--train.exact", "true", "--train.num_micro_batches", "8"]
LINES = b"--seed 1\r\n--model.name tiny\r\n--seed 3\r\n"


@pytest.mark.parametrize(
    ("options", "passed", "world_size"),
    [
        ("", "--nodes 1 --ntasks-per-node 1", 1),
        ("--nodes 2", "--nodes 2 --ntasks-per-node 1", 2),
        ("--nodes 2 --ntasks-per-node 4", "--nodes 2 --ntasks-per-node 4", 8),
        ("--ntasks=7", "--ntasks 7", 7),
        ("-N 2 -n 8", "--nodes 2 --ntasks 8", 8),
        ("-N 2 -G 6 --cpus-per-gpu=8", "--nodes 2 --gpus 6 --cpus-per-gpu=8", 6),
        ("--nodes 2 --gpus-per-node h100:4", "--nodes 2 --gpus-per-node h100:4", 8),
        ("--nodes 2 --gpus-per-node 0", "--nodes 2 --ntasks-per-node 1", 2),
        ("--nodes 2 --gres=gpu:2", "--nodes 2 --gres gpu:2", 4),
        ("--nodes 2 --gres=gres:gpu:2", "--nodes 2 --gres gres:gpu:2", 4),
        ("--nodes 2 --gpus 2 --gres=gpumem:20g", "--nodes 2 --gpus 2 --gres gpumem:20g", 2),
        ("--gpus=3g.20gb:2", "--gpus 3g.20gb:2", 2),
        ("--nodes 2 --gres=gpu:h100:2,tmpdisk:9", "--nodes 2 --gres gpu:h100:2,tmpdisk:9", 4),
        ("--nodes 2 --ntasks 3 --gpus-per-task=1", "--nodes 2 --ntasks 3 --gpus-per-task=1", 3),
        ("--nodes 2 --gpus-per-node 4 --ntasks-per-node 1", "--nodes 2 --gpus-per-node 4 --ntasks-per-node 1", 8),
        ("--nodes 2 --gpus-per-node 4 --ntasks 8", "--nodes 2 --gpus-per-node 4 --ntasks 8", 8),
    ],
)
def test_options_that_ask_for_ranks(
    options: str, passed: str, world_size: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    monkeypatch.setattr(slurm, "check_world", lambda config, size: checked.append(size))
    assert slurm.main([*options.split(), "--dry-run", "--", *SMALL]) == 0
    assert capsys.readouterr().out.split(" slurm/train.sbatch ")[0] == f"sbatch --parsable {passed}"
    assert checked == [world_size]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--ntasks 9", "9 processes cannot share"),
        ("--nodes 2 --gpus 9", "9 processes cannot share"),
        ("--nodes 2 --gpus-per-node 2 --ntasks-per-node 4", "--gpus-per-node gives 4, --ntasks-per-node gives 8"),
        ("--nodes 2 --ntasks 7 --ntasks-per-node 4", "--ntasks gives 7, --ntasks-per-node gives 8"),
        ("--gpus many", "--gpus is many. Use NUMBER or TYPE:NUMBER."),
        ("--ntasks 0", "--ntasks is 0. Use 1 or more."),
        ("--gpus 4 --ntasks-per-gpu=2", "--ntasks-per-gpu=2 does not give the number of ranks"),
        ("--ntasks 2 --gpus-per-task=2", "--gpus-per-task=2 does not give the number of ranks"),
        ("--nodes 2 --tres-per-node=gres/gpu:4", "--tres-per-node=gres/gpu:4 does not give the number of ranks"),
        ("--quiet", "--quiet keeps sbatch from printing the job's id"),
        ("--gres=gpu", "--gres is gpu. Use gpu:NUMBER or gpu:TYPE:NUMBER."),
        (
            "--sweep lines.txt --array=0-2",
            "has 3 lines, and no line 0 of --array=0-2. Lines count from 1: use --array=1-3.",
        ),
        ("--sweep lines.txt --array=1,3-9:6%2", "no line 9 of"),
        ("--sweep lines.txt --array=all", "--array is all. Use FIRST-LAST"),
    ],
)
def test_contradictions_are_refused(options: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lines.txt").write_bytes(LINES)
    monkeypatch.setattr(slurm, "ROOT", tmp_path)
    with pytest.raises(UserError) as error:
        slurm.main([*options.split(), "--dry-run", "--", *SMALL])
    assert words in str(error.value)


def test_array_may_leave_lines_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_bytes(LINES)
    monkeypatch.setattr(slurm, "ROOT", tmp_path)
    assert slurm.main(["--sweep", "lines.txt", "--array=1-3:2", "--dry-run", "--", *SMALL]) == 0
    assert "--array 1-3:2 slurm/sweep.sbatch lines.txt" in capsys.readouterr().out


def test_runs_of_a_sweep_are_in_the_run_dir_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    (tmp_path / "own.yaml").write_text(f"run: {{dir: {tmp_path}/mine}}\n")
    config = ["--config", str(tmp_path / "own.yaml"), "--run.name", "seed-1"]
    assert slurm.main(["--print-run", "--sweep", "seeds", "--", *config]) == 0
    assert slurm.main(["--print-run", "--", *config]) == 0
    assert capsys.readouterr().out.split() == [f"{tmp_path}/mine/sweep-7/seed-1", f"{tmp_path}/mine/seed-1"]


def test_sbatch_is_not_told_of_the_job_that_it_is_called_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "SLURM_CPU_BIND", "SLURM_CONF"):
        monkeypatch.setenv(name, "/x")
    names = [line.split("=")[0] for line in slurm.run("env").splitlines()]
    assert [name for name in names if name.startswith("SLURM_")] == ["SLURM_CONF"]


@pytest.mark.parametrize("site", ["set -euo pipefail\nfalse\n", "set -u\r\n", "set -e\nfalse\n"])
def test_site_env_reaches_sbatch_and_changes_nothing_else(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm").mkdir()
    line_end = "\r\n" if "\r" in site else "\n"
    (tmp_path / "slurm" / "site.env").write_bytes(f"{site}SBATCH_ACCOUNT=mine{line_end}".encode())
    monkeypatch.setattr(slurm, "ROOT", tmp_path)
    assert slurm.run("bash", "-c", 'printf %q "$SBATCH_ACCOUNT"') == "mine"

"""A run directory has one writer, and an old attempt that wakes up writes nothing."""

import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from conftest import small_state
from ranks.processes import Ranks, arguments, rows, train, wait_for_step

from train.errors import UserError
from train.rundir import RunDir
from train.storage import checkpoint
from train.storage.lease import Fenced, Lease, is_later_attempt

_context = multiprocessing.get_context("spawn")


def tree(run: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in sorted(run.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def save(lease: Lease, step: int) -> Path:
    with lease.writing() as staging:
        return checkpoint.write(lease.checkpoints, step, checkpoint.encode(small_state(step)), staging)


def prune(lease: Lease) -> None:
    with lease.writing() as staging:
        checkpoint.prune(lease.checkpoints, 1, set(), staging)


def hold(run: Path, pipe: Connection, job: str | None, restart: str) -> None:
    """Acquire the lease, report it, and hold it until a message arrives (or a kill). Runs in another process."""
    if job:
        os.environ |= {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart}
    with Lease(run, is_main=True):
        pipe.send("held")
        pipe.recv()


def other(
    run: Path, job: str | None = None, restart: str = "0"
) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=hold, args=(run, theirs, job, restart))
    process.start()
    assert ours.poll(120)
    assert ours.recv() == "held"
    return process, ours


def test_leaves_no_trace(tmp_path: Path) -> None:
    with Lease(tmp_path / "run", is_main=True) as lease:
        path = save(lease, 10)
        lease.write(tmp_path / "run" / "summary.json", b"{}")
    assert sorted(found.name for found in (tmp_path / "run").iterdir()) == ["checkpoints", "summary.json"]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [path]


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    with Lease(tmp_path / "run", is_main=False):
        assert list(tmp_path.iterdir()) == []


def test_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    process, _ = other(tmp_path)
    with pytest.raises(UserError, match=f"is being trained by process {process.pid} on .*, since ") as error:
        Lease(tmp_path, is_main=True)
    assert "\n" not in str(error.value)
    process.kill()  # the lock ends with its owner
    process.join()
    with Lease(tmp_path, is_main=True) as lease:
        assert [path.name for path in lease.checkpoints.iterdir()] == [lease.staging.name]


def test_later_attempt_of_a_slurm_job_takes_over_from_a_silent_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, pipe = other(tmp_path, "7", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(UserError, match=r"Slurm job 7, attempt 1"):  # a second srun in the same attempt
        Lease(tmp_path, is_main=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Lease(tmp_path, is_main=True):
        pipe.send("leave")  # the old one's end must not take the new one's lock away
        process.join()
        assert (tmp_path / ".lock").exists()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        with pytest.raises(UserError, match=r"Slurm job 7, attempt 2"):
            Lease(tmp_path, is_main=True)


@pytest.mark.parametrize("job", [None, "7"])
def test_only_a_later_attempt_of_the_same_job_may_take_over(job: str | None) -> None:
    attempts = [{"job": job, "restart": restart} for restart in range(3)]
    may_take_over = [[is_later_attempt(new, old) for old in attempts] for new in attempts]
    expected = [[False] * 3] * 3 if job is None else [[False] * 3, [True, False, False], [True, True, False]]
    assert may_take_over == expected
    assert not is_later_attempt({"job": "8", "restart": 9}, attempts[0])
    assert not is_later_attempt({"job": "8", "restart": 9}, {})


def test_srun_after_a_lost_node_may_take_over_and_a_node_that_returns_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """slurm/train.sbatch counts its attempts. A cut-off first node could count further than the job's new attempt."""
    process, _ = other(tmp_path, "7", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv("LOCKSTEP_RESTART", "5")
    with pytest.raises(UserError, match="is being trained by process"):
        Lease(tmp_path, is_main=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Lease(tmp_path, is_main=True):
        process.kill()
        process.join()


def test_old_attempt_can_neither_save_nor_prune_nor_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    old = Lease(tmp_path, is_main=True)
    for step in (10, 20):
        save(old, step)
    (old.staging / "step-00000030").mkdir()  # it was cut off in the middle of a save
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 20}\n')
    log = open(tmp_path / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Lease(tmp_path, is_main=True) as new:
        RunDir(tmp_path).remove_rows_after(20, new.staging)
        before = tree(tmp_path)
        log.write('{"event": "train", "step": 21}\n')
        for attempt in (
            lambda: save(old, 30),
            lambda: prune(old),
            lambda: old.write(tmp_path / "summary.json", b"{}"),
            lambda: RunDir(tmp_path).remove_rows_after(0, old.staging),
            lambda: (old.staging / "step-00000030" / "model.safetensors").write_bytes(b""),
        ):
            with pytest.raises(
                (Fenced, FileNotFoundError), match=r"fenced: process \d+ on .*, Slurm job 7, attempt 2|No such file"
            ):
                attempt()
        assert tree(tmp_path) == before
        save(new, 30)
        old.__exit__(None, None, None)
        log.close()
        with pytest.raises(UserError):
            Lease(tmp_path, is_main=True)
    assert [row["step"] for row in RunDir(tmp_path).read_rows()] == [20]
    assert [checkpoint.step_of(path) for path in checkpoint.directories(tmp_path / "checkpoints")] == [30, 20, 10]


def test_fenced_at_each_moment_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a save is taken over at any of its fsyncs, its checkpoint never appears."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    fsync, moments = os.fsync, 0
    for moment in range(5):
        run = tmp_path / str(moment)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        old, calls, new = Lease(run, is_main=True), 0, None

        def take_over(descriptor: int, moment: int = moment, run: Path = run) -> None:
            nonlocal calls, new
            if calls == moment:
                monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
                new = Lease(run, is_main=True)
            calls += 1
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", take_over)
        with pytest.raises(Fenced):
            save(old, 10)
        monkeypatch.setattr(os, "fsync", fsync)
        assert new is not None
        assert checkpoint.directories(run / "checkpoints") == []
        moments += 1
        for lease in (old, new):
            lease.__exit__(None, None, None)
    assert moments == 5


def test_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with Lease(tmp_path, is_main=True):
        assert "cannot be locked: Function not implemented" in capsys.readouterr().err


def test_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        Lease(tmp_path / "file" / "run", is_main=True)


def test_two_trainings_in_one_directory(tmp_path: Path) -> None:
    """The second is refused with exit code 2 on all its ranks. The first one is not disturbed."""
    run = tmp_path / "run"
    flags = "--train.exact true --train.num_micro_batches 4 --train.epochs 40 --optim.lr 0.01 --log.every_steps 1"
    first = Ranks(1, arguments(run, flags), tmp_path / "first")
    wait_for_step(run, 3)
    second = Ranks(2, arguments(run, flags), tmp_path / "second")
    assert second.wait() == [2, 2]
    assert second.output().count("error:") == 1
    assert f"is being trained by process {first.processes[0].pid} on " in second.output()
    first.signal(signal.SIGTERM)
    assert first.wait() == [75]
    assert len(rows(run, "start")) == 1
    again = train(1, run, flags)  # a run that starts after its end continues
    assert again["outcome"] == "finished"
    assert json.loads((run / "summary.json").read_text()) == again
    assert not list(run.rglob(".*"))

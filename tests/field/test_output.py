"""What is printed never decides what becomes of a run; a command that only prints ends when nobody reads."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ranks.processes import arguments, rows, wait_for_step

FLAGS = "--train.max_steps 40 --log.every_steps 5 --log.progress true"
TRAIN, RUN = (sys.executable, "-m", "train"), (sys.executable, "-m", "launch", "run", "--nproc", "2", "--")
CommandLine = tuple[str, ...]


def start(command: CommandLine, **options: Any) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **options)


def check_finished(run: Path, code: int) -> None:
    """Check that a run ended as if somebody had read all of its lines."""
    assert code == 0
    assert rows(run)[-1]["event"] == "saved"
    assert (run / "summary.json").exists()


@pytest.mark.parametrize("command", [TRAIN, RUN], ids=["train", "launch run"])
def test_run_survives_a_full_disk_under_its_log(command: CommandLine, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start((*command, *arguments(tmp_path / "run", FLAGS)), stdout=full, stderr=full)
    check_finished(tmp_path / "run", process.wait(100))


@pytest.mark.parametrize("command", [TRAIN, RUN], ids=["train", "launch run"])
def test_run_survives_a_reader_that_leaves(command: CommandLine, tmp_path: Path) -> None:
    process = start((*command, *arguments(tmp_path / "run", FLAGS)), stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    check_finished(tmp_path / "run", process.wait(100))


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "<&- >&- 2>&-"])
def test_run_survives_closed_streams_and_writes_none_of_its_lines_into_its_files(closed: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(("bash", "-c", f'"$@" {closed}', "bash", *TRAIN, *arguments(run, FLAGS)), stdout=subprocess.DEVNULL)
    check_finished(run, process.wait(100))
    assert not [path for path in run.rglob("*") if path.is_file() and b"steps per epoch" in path.read_bytes()]


def test_run_survives_the_loss_of_its_terminal(tmp_path: Path) -> None:
    """As with a closed window, where SIGHUP is ignored."""
    ours, theirs = pty.openpty()
    command = ("bash", "-c", 'trap "" HUP; exec "$@"', "bash", *TRAIN, *arguments(tmp_path / "run", FLAGS))
    process = start(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    check_finished(tmp_path / "run", process.wait(100))


def test_run_prints_characters_that_its_stream_lacks(tmp_path: Path) -> None:
    """A name in another alphabet, in a terminal that has ASCII only."""
    run = tmp_path / "\u043f\u0440\u0438\u0432\u0435\u0442" / "run"
    process = start((*TRAIN, *arguments(run, FLAGS)), stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    output, _ = process.communicate(timeout=100)
    check_finished(run, process.returncode)
    assert r"\u043f" in output


def test_launcher_restarts_ranks_although_it_cannot_print(tmp_path: Path) -> None:
    flags = f"{FLAGS} --checkpoint.every_steps 5 --train.max_steps 300"
    command = (*RUN[:-1], "--max-restarts", "1", "--", *arguments(tmp_path / "run", flags))
    with open("/dev/full", "w") as full:
        process = start(command, stdout=full, stderr=full)
    wait_for_step(tmp_path / "run", 10)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), 9)
    check_finished(tmp_path / "run", process.wait(100))
    assert len(rows(tmp_path / "run", "start")) == 2


@pytest.mark.parametrize("argv", ["--help", "plan -- --train.device cpu", "bench --help", "--version"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_command_that_only_prints_ends_silently_without_a_reader(argv: str, unbuffered: str) -> None:
    command = (sys.executable, "-m", "launch", *argv.split())
    reader, writer = os.pipe()
    os.close(reader)
    process = start(command, stdout=writer, stderr=subprocess.PIPE, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141


@pytest.mark.parametrize("argv", ["launch --help", "launch plan -- --train.device cpu", "train --print_config"])
def test_command_that_only_prints_reports_a_full_disk_in_one_line(argv: str) -> None:
    with open("/dev/full", "w") as full:
        process = start((sys.executable, "-m", *argv.split()), stdout=full, stderr=subprocess.PIPE)
    assert process.communicate(timeout=60)[1] == "error: The output cannot be written: No space left on device.\n"
    assert process.returncode == 1


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_no_bar_is_drawn_into_a_file(
    name: str, tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run = tmp_path / "run"
    done = python("-m", "train", *arguments(run, FLAGS), **{name: "1"})
    assert "\x1b" not in done.stdout
    assert "step 40/40" in done.stdout
    watched = python("-m", "launch", "watch", str(run), **{name: "1"})
    assert "\x1b" not in watched.stdout
    assert "40 of 40" in watched.stdout

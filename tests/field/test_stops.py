"""A signal loses nothing: before training it ends a process at once, and main() gives back what it changed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from ranks.processes import arguments, free_port, rows, wait_for_step

import train.__main__
import train.loop
from launch.run import Ranks
from train.__main__ import main
from train.world import signals

TRAIN, RUN = (sys.executable, "-m", "train"), (sys.executable, "-m", "launch", "run", "--nproc", "2", "--")
LONG = "--train.max_steps 100000 --checkpoint.every_steps 100000 --eval.every_steps 100000 --log.every_steps 10"


def start(*command: str, **env: str) -> subprocess.Popen[str]:
    def hear() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite that runs in the background ignores it

    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=subprocess.STDOUT, preexec_fn=hear
    )


@pytest.mark.parametrize("command", [TRAIN, RUN], ids=["train", "launch run"])
def test_closed_terminal_saves_as_any_other_signal(command: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*command, *arguments(run, LONG))
    wait_for_step(run, 20)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    assert "SIGHUP received: saving after this step" in output
    assert output.count("received") == 1
    assert [row["step"] for row in rows(run, "saved")] == [rows(run, "preempted")[-1]["step"]]


@pytest.mark.parametrize("command", [TRAIN, RUN], ids=["train", "launch run"])
def test_ignored_hangup_stays_ignored(command: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("nohup", *command, *arguments(run, "--train.max_steps 150 --log.every_steps 10"))
    wait_for_step(run, 20)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output


@pytest.mark.sample(3)
@pytest.mark.parametrize("number", signals.SIGNALS)
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_waits_for_others_ends_at_once(number: signal.Signals, rank: int, tmp_path: Path) -> None:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    port = str(free_port())
    process = start(*TRAIN, *arguments(tmp_path / "run"), **place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    deadline = time.monotonic() + 60
    while "torch_python" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2.0)  # torch is imported; the rank is in the rendezvous
    began = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == 75
    expected = f"{number.name} received: stopped before the first step, nothing to save\n"
    assert output == (expected if rank == 0 else "")
    assert not (tmp_path / "run").exists()


def test_thread_that_waits_in_cpp_is_not_interrupted_and_the_signal_is_received() -> None:
    """torch prints a stack trace where a signal interrupts its sockets."""
    with signals.restoring():
        signals.defer()
        with signals.left_to_thread():
            assert set(signals.SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, [])
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 60
            while signals.requested() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert signals.requested() == "SIGTERM"
        assert not set(signals.SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_program_without_our_handlers_keeps_its_signals_while_it_waits() -> None:
    """Ctrl-C in a notebook that waits for other ranks must interrupt it."""
    with signals.left_to_thread():
        assert not set(signals.SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_main_gives_handlers_back_and_forgets_what_it_received(tmp_path: Path) -> None:
    numbers = (*signals.SIGNALS, signal.SIGALRM)
    before, timer = [signal.getsignal(number) for number in numbers], signal.getitimer(signal.ITIMER_REAL)

    def stop() -> None:
        wait_for_step(tmp_path / "a", 10)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert main(arguments(tmp_path / "a", LONG, "--run.time_limit 100")) == 75
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_REAL) == timer
    assert (
        "signals" not in {thread.name for thread in threading.enumerate() if thread.is_alive()} or time.sleep(1) is None
    )
    assert main(arguments(tmp_path / "b", "--train.max_steps 10")) == 0


def test_program_that_calls_main_keeps_its_handlers_until_there_is_something_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a notebook that loads data must not end the notebook."""
    load, before, found = train.loop.data.load, signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(
        train.loop.data, "load", lambda *arguments: found.append(signal.getsignal(signal.SIGTERM)) or load(*arguments)
    )
    assert main(arguments(tmp_path / "run", "--train.max_steps 1")) == 0
    assert found == [before]


def test_second_training_at_the_same_time_in_a_process_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with train.__main__._one_at_a_time:
        assert main(arguments(tmp_path / "run")) == 2
    assert capsys.readouterr().err.startswith("error: Another training runs in this process.")


def test_main_trains_in_another_thread(tmp_path: Path) -> None:
    codes: list[int] = []
    argv = arguments(tmp_path / "run", "--train.max_steps 10 --run.time_limit 100")
    thread = threading.Thread(target=lambda: codes.append(main(argv)))
    thread.start()
    thread.join(100)
    assert codes == [0]


@pytest.mark.parametrize("nproc", [3, 8])
def test_launcher_refuses_too_many_ranks_before_it_starts_one(
    nproc: int, tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    argv = arguments(tmp_path / "run", "--train.num_micro_batches 2")
    done = python("-m", "launch", "run", "--nproc", str(nproc), "--max-restarts", "3", "--", *argv)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {nproc} processes cannot share train.num_micro_batches 2.")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("at", ["0", "2"])
def test_bad_input_of_one_rank_is_the_code_of_all_and_is_not_restarted(at: str, tmp_path: Path) -> None:
    """The others are killed, or crash because it is gone."""
    script = tmp_path / "rank.py"
    for late in ("==", "!="):  # the rank with bad input comes last, or first
        script.write_text(
            f"import os, sys, time\nif os.environ['RANK'] {late} '{at}': time.sleep(0.3)\n"
            f"sys.exit(2 if os.environ['RANK'] == '{at}' else 1)\n"
        )
        assert Ranks(3, [], program=(sys.executable, str(script))).wait() == 2


def test_rank_ended_by_a_signal_without_a_name_is_a_crash_that_is_restarted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = "--train.max_steps 400 --log.every_steps 5 --checkpoint.every_steps 20"
    process = start(*RUN[:-1], "--max-restarts", "1", "--", *arguments(run, flags))
    wait_for_step(run, 20)
    os.kill(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]), signal.SIGRTMIN + 3)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert len(rows(run, "start")) == 2


def test_run_outlives_a_shell_that_is_no_launcher(tmp_path: Path) -> None:
    """A variable that torchrun has left behind does not tie a run to its parent."""
    run, flags = tmp_path / "run", "--train.max_steps 400 --log.every_steps 5"
    script = f'"$@" >/dev/null 2>&1 & until [ -e {run}/metrics.jsonl ]; do sleep 0.1; done'
    shell = start("sh", "-c", script, "sh", *TRAIN, *arguments(run, flags), TORCHELASTIC_RUN_ID="old")
    shell.communicate(timeout=60)
    deadline = time.monotonic() + 100
    while not (run / "summary.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_interrupted_command_ends_without_a_traceback(tmp_path: Path) -> None:
    process = start(sys.executable, "-m", "launch", "selftest")
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output

"""A signal to any rank, at any time, stops all real processes at one step, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks.processes import Ranks, arguments, rows, train, wait_for_step

FLAGS = (
    "--model.name tiny_bn --train.num_micro_batches 2 --model.dropout 0.2 --optim.ema 0.9 --train.max_steps 60 "
    "--log.every_steps 1 --eval.every_steps 20 --checkpoint.every_steps 20 --checkpoint.keep 9"
)
SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR2]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the summary of a run without signals."""
    return train(request.param, tmp_path_factory.mktemp("undisturbed") / "run", FLAGS)


def check_preempted(run: Path, ranks: Ranks, undisturbed: dict[str, Any], step: int | None = None) -> None:
    """Check that all ranks saved and left with 75, and that a resume repeats no step and ends with the same bits."""
    assert set(ranks.wait()) == {75}, ranks.output()
    assert "Traceback" not in ranks.output()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["outcome"] == "preempted"
    assert step in (None, summary["step"])
    assert max((run / "checkpoints").glob("step-*")).name == f"step-{summary['step']:08d}"
    resumed = train(undisturbed["world_size"], run, FLAGS)
    assert rows(run, "start")[-1]["step"] == summary["step"]  # nothing is computed twice
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 61))
    for name in ("weights_sha256", "ema_weights_sha256", "results", "best"):
        assert resumed[name] == undisturbed[name]
    assert not [path for path in run.rglob("*") if "writing" in path.name or path.name == ".ranks"]


MOMENTS = {"evaluate": 21, "save": 21}  # and the step after which all leave
CASES = [(moment, number, 1) for moment in MOMENTS for number in SIGNALS]
CASES += [("evaluate", signal.SIGTERM, 2), ("save", signal.SIGTERM, 2), ("save", signal.SIGINT, 2)]


@pytest.mark.sample(5)
@pytest.mark.parametrize(("moment", "number", "times"), CASES)
def test_signal_at_a_bad_moment_loses_nothing(
    tmp_path: Path, undisturbed: dict[str, Any], moment: str, number: signal.Signals, times: int
) -> None:
    run, marker, world_size = tmp_path / "run", tmp_path / "marker", undisturbed["world_size"]
    accident = {"MUTANT": f"accidents.waits_in_{moment}", "MARKER": str(marker)}
    ranks = Ranks(world_size, arguments(run, FLAGS), tmp_path / "logs", **accident)
    deadline = time.monotonic() + 100
    while not marker.exists():
        assert time.monotonic() < deadline, ranks.output()
        time.sleep(0.002)
    for _ in range(times):
        ranks.signal(number, rank=world_size - 1 if moment != "save" else 0)  # in the save: the rank that writes
        time.sleep(0.05)
    marker.unlink()
    check_preempted(run, ranks, undisturbed, MOMENTS[moment])


@pytest.mark.sample(2)
@pytest.mark.parametrize("number", SIGNALS)
def test_signal_before_the_first_step_ends_all_at_once(
    tmp_path: Path, undisturbed: dict[str, Any], number: signal.Signals
) -> None:
    run, marker, world_size = tmp_path / "run", tmp_path / "marker", undisturbed["world_size"]
    accident = {"MUTANT": "accidents.waits_in_start", "MARKER": str(marker)}
    ranks = Ranks(world_size, arguments(run, FLAGS), tmp_path / "logs", **accident)
    deadline = time.monotonic() + 100
    while not marker.exists():
        assert time.monotonic() < deadline, ranks.output()
        time.sleep(0.002)
    ranks.signal(number)
    assert ranks.wait(5) == [75] * world_size
    assert ranks.output() == f"{number.name} received: stopped before the first step, nothing to save\n"
    assert train(world_size, run, FLAGS)["weights_sha256"] == undisturbed["weights_sha256"]


@pytest.mark.sample(3)
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("who", ["one", "all", "one after the other"])
def test_signal_while_training_loses_nothing(
    tmp_path: Path, undisturbed: dict[str, Any], number: signal.Signals, who: str
) -> None:
    world_size = undisturbed["world_size"]
    run = tmp_path / "run"
    ranks = Ranks(world_size, arguments(run, FLAGS), tmp_path / "logs", MUTANT="slow_steps")
    wait_for_step(run, 5)
    for rank in {"one": [1], "all": [0, 1], "one after the other": [1, 0]}[who]:  # a single one: twice
        ranks.signal(number, rank=rank % world_size)
        time.sleep(0.01 * (who == "one after the other"))
    check_preempted(run, ranks, undisturbed)


def test_time_limit_acts_like_a_signal(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    run = tmp_path / "run"
    limit = "--run.time_limit 0.02"  # 60 slow steps take as long, in addition to the start
    ranks = Ranks(undisturbed["world_size"], arguments(run, FLAGS, limit), tmp_path / "logs", MUTANT="slow_steps")
    check_preempted(run, ranks, undisturbed)
    # either rank's time may be up first
    assert rows(run, "preempted")[-1]["signal"] in ("run.time_limit", "a signal to another rank")


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_process_survives() -> Iterator[None]:
    """Kill what a failed test left behind, so that it does not disturb the next one."""
    yield
    for process in STARTED:
        process.kill()
        process.communicate()
    STARTED.clear()


def start(run: Path, *command: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, *command, *arguments(run, FLAGS)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


def has_handlers(pid: int) -> bool:
    """Return whether a process catches SIGTERM, according to the kernel."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.sample(2)
@pytest.mark.parametrize("number", SIGNALS)
def test_signal_while_torch_is_being_imported_ends_all_at_once(
    tmp_path: Path, undisturbed: dict[str, Any], number: signal.Signals
) -> None:
    """The signal comes as soon as `python -m train` or `launch run` has handlers, 0.1 s after its start."""
    world_size, run = undisturbed["world_size"], tmp_path / "run"
    command = ["-m", "train"] if world_size == 1 else ["-m", "launch", "run", "--nproc", "2", "--"]
    process = start(run, *command)
    deadline = time.monotonic() + 60
    while not has_handlers(process.pid):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert "torch/lib" not in Path(f"/proc/{process.pid}/maps").read_text()
    if world_size == 2:  # the launcher alone gets it, while it starts its ranks, which have no handlers yet
        while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.001)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert not (run / "summary.json").exists()
    assert train(world_size, run, FLAGS)["weights_sha256"] == undisturbed["weights_sha256"]


def test_signal_before_the_launcher_has_started_ranks_preempts_them(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "-m", "launch", "run", "--nproc", "2", "--")
    deadline = time.monotonic() + 60
    while not has_handlers(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 75, output
    assert "Traceback" not in output

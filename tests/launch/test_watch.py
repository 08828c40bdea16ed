"""The live view reads metrics.jsonl alone and survives torn lines, replaced files and directories that appear later."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT
from pages import STEPS, make_rows, make_run
from ranks.processes import train

from launch.__main__ import main as launch
from launch.watch import pulse, read
from train.report.charts import sparkline

NOW = 1e9  # when the made-up rows begin


def once(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the single frame that is printed without a terminal."""
    assert launch(["watch", str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\x1b" not in printed.out
    return re.sub(r" +", " ", printed.out)


def test_frame_shows_what_the_rows_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", make_rows(restarts=(30,))[:-1], None)
    monkeypatch.setattr(time, "time", lambda: NOW + 75)
    monkeypatch.setenv("COLUMNS", "100")
    text = once(run, capsys)
    assert "loss 0.0100 █▇▅▄▂▁" in text
    headline = (
        "run mnist running, last row 0:00:15 ago",
        "step 60 of 60 100% epoch 2.00",
        "accuracy 93.00% (test, step 30)",
        "images/s 10,000",
    )
    for words in (
        *headline,
        "learning rate 0.001639",
        "time left 0:00:00",
        "processes 4 → 2 (1 restart)",
        "checkpoint none yet",
    ):
        assert words in text, words


def test_loss_that_is_not_finite_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows()
    run = make_run(tmp_path / "run", [{**row, "loss": None} if row["event"] == "train" else row for row in rows], None)
    assert "loss not finite" in once(run, capsys)


def test_real_run_is_seen_to_be_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(1, run, "--train.max_steps 30 --log.every_steps 10 --optim.ema 0.9")
    text = once(run, capsys)
    for words in (
        "run digits finished",
        "step 30 of 30 100%",
        "test, step 30, averaged",
        "processes 1",
        "checkpoint step 30",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("rows", "seconds", "message"),
    [
        (make_rows()[:4], 45.0, "running, last row 0:00:15 ago"),
        (make_rows()[:4], 3600.0, "no news: last row 0:59:30 ago. Is it still running?"),
        (make_rows(restarts=(30,))[:6], 90.0, "preempted by SIGTERM, last row 0:01:00 ago; waiting for it to resume"),
        (make_rows(), 90.0, "running, last row 0:00:30 ago"),  # the last step, but not saved yet
        (
            [*make_rows(), *({"event": event, "step": STEPS, "time": NOW + 60} for event in ("saved", "save_failed"))],
            90.0,
            "running, last row 0:00:30 ago",
        ),
        ([*make_rows(), {"event": "saved", "step": STEPS, "time": NOW + 60}], 9000.0, "finished"),
        ([{"event": "start", "step": 0}], 9000.0, "running, last row 0:00:00 ago"),  # an old row, without its time
        (make_rows()[:4], 0.0, "running, last row 0:00:00 ago"),  # the other machine's clock is ahead
    ],
)
def test_pulse(tmp_path: Path, rows: list[dict], seconds: float, message: str) -> None:
    record = read(make_run(tmp_path / "run", rows, None))
    assert record
    assert pulse(record, NOW + seconds)[0] == message


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, 3]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1000)))) <= 24
    assert sparkline(list(range(1000)))[-1] == "█"


def test_what_is_no_run_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "odd" / "metrics.jsonl").mkdir(parents=True)
    for name, message in (
        ("nowhere", "has no rows in metrics.jsonl"),
        ("file", "has no rows in metrics.jsonl"),
        ("odd", "metrics.jsonl cannot be read: Is a directory"),
    ):
        assert launch(["watch", str(tmp_path / name)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert message in printed
        assert printed.count("\n") == 1


class Terminal:
    """Run `python -m launch watch RUN` on a terminal and collect what it draws."""

    def __init__(self, run: Path) -> None:
        self.drawn, (self.own, its) = "", pty.openpty()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"}
        command = [sys.executable, "-m", "launch", "watch", str(run)]
        self.process = subprocess.Popen(
            command,
            env=env,
            cwd=ROOT,
            stdin=its,
            stdout=its,
            stderr=its,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
        os.close(its)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Collect until the other side is closed."""
        while True:
            select.select([self.own], [], [])
            try:
                chunk = os.read(self.own, 65536)
            except OSError:  # on Linux: the other side has closed
                return
            self.drawn += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", chunk.decode(errors="replace"))

    def wait(self, ready: Callable[[str], bool], seconds: float = 100) -> None:
        """Return once what was drawn since the last call satisfies `ready`."""
        deadline = time.monotonic() + seconds
        while not ready(" ".join(self.drawn.split())):  # a long path wraps
            assert time.monotonic() < deadline, self.drawn[-3000:]
            assert self.process.poll() is None, self.drawn[-3000:]
            time.sleep(0.05)
        self.drawn = ""


def write(run: Path, rows: list[dict], torn: str = "") -> None:
    """Replace metrics.jsonl by a new file, as a resume does."""
    (run / "new").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    os.replace(run / "new", run / "metrics.jsonl")


def test_live_view_follows_a_run_from_before_its_start_to_its_end(tmp_path: Path) -> None:
    run, rows = tmp_path / "later" / "run", make_rows(restarts=(30,))
    rows = [{**row, "time": time.time()} for row in rows]
    terminal = Terminal(run)
    try:
        terminal.wait(lambda text: "waiting for its first row" in text)
        run.mkdir(parents=True)
        write(run, rows[:3], '{"event": "train", "st')
        terminal.wait(lambda text: "step 20 of 60" in text and "running" in text)
        with open(run / "metrics.jsonl", "a") as file:  # the torn line becomes whole, and rows follow
            file.write('ep": 25, "loss": 1.0, "lr": 0.1, "images_per_second": 1, "seconds_left": 1, "epoch": 1}\n')
            file.writelines(json.dumps(row) + "\n" for row in rows[3:6])
        terminal.wait(lambda text: "preempted by SIGTERM" in text and "93.00%" in text)
        write(run, rows[:2])  # a resume from an earlier checkpoint
        terminal.wait(lambda text: "step 10 of 60" in text and "accuracy" not in text)
        (run / "metrics.jsonl").unlink()  # a remote mount that hiccups
        time.sleep(1.5)
        assert terminal.process.poll() is None
        write(run, [*rows, {"event": "saved", "step": STEPS, "time": time.time()}])
        assert terminal.process.wait(100) == 0
        terminal.reader.join(100)
        assert "finished" in terminal.drawn
        assert "step 60 of 60" in re.sub(r" +", " ", terminal.drawn)
    finally:
        terminal.process.kill()


def test_leaving_is_no_failure(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_rows()[:4], None)
    terminal = Terminal(run)
    terminal.wait(lambda text: "step 30 of 60" in text)
    os.write(terminal.own, b"\x03")  # Ctrl-C
    terminal.process.send_signal(2)  # this terminal controls no process and sends no signal itself
    assert terminal.process.wait(100) == 0

"""W&B is kept by a process of its own that follows metrics.jsonl, so that nothing it does can reach training.

Training starts it and tells it when the run has ended; it reads everything else from the run directory, as `launch sync` does
later for what it could not send. Training loses a few milliseconds at its start, and at its end at most wandb.finish_seconds.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.cli import parse
from train.config import Config
from train.tracking.mirror import MIRRORED, Mirror, Row, brief, end_row, remedy
from train.world import signals

POLL_SECONDS = 0.5
BINS = 64


def mode_of(config: Config) -> str:
    """The mode that holds: wandb.mode, or in mode auto what WANDB_MODE says."""
    mode: str = config.wandb.mode
    return os.environ.get("WANDB_MODE") or "auto" if mode == "auto" else mode


def histograms(parameters: Mapping[str, Any]) -> Row:
    """The values of a `weights` row: for each tensor its smallest and largest value, and counts in BINS equal bins between."""
    import torch

    found = {}
    for name, tensor in parameters.items():
        values = tensor.detach().float().cpu().reshape(-1)  # a host-device sync; histc is not deterministic on a GPU
        low, high = (float(edge) for edge in values.aminmax())
        if bool(torch.isfinite(values).all()) and low < high:
            found[name] = [low, high, torch.histc(values, BINS, low, high).int().tolist()]
    return found


class Tracker:
    """Training's end of the mirror: starts the process, shows what it prints, and ends it."""

    def __init__(self, config: Config, run_dir: Path, say: Callable[[str], None]) -> None:
        """Start it; metrics.jsonl must have this life's `start` row."""
        self.seconds, self.run_dir, self.say = config.wandb.finish_seconds, run_dir, say
        command = (sys.executable, "-m", "train.tracking.tracker", str(run_dir.resolve()), mode_of(config))
        root = Path(__file__).parents[2]  # where the code is: W&B notes the state of git there
        self.process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self._show, daemon=True)
        self.reader.start()

    def _show(self) -> None:
        for line in self.process.stdout or ():
            self.say(line.rstrip())

    def close(self, error: BaseException | None) -> None:
        """Let it send what is left, for at most wandb.finish_seconds."""
        assert self.process.stdin
        try:
            with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
                pipe.write(json.dumps(str(error) if error else None) + "\n")
            self.process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.say(f"wandb: not done after {self.seconds} s; {remedy(self.run_dir)}")
        self.reader.join(POLL_SECONDS)


class Tail:
    """The whole rows of a growing metrics.jsonl; a torn last line, which a kill can leave, is not one."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0

    def rows(self) -> list[Row]:
        """The rows since the last call; none if there is no file."""
        found = []
        if self.path.exists():
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                lines = file.readlines()
            for line in lines:
                if line.endswith(b"\n"):
                    self.offset += len(line)
                    with contextlib.suppress(ValueError):
                        found.append(json.loads(line))
        return found


def open_mirror(run_dir: Path, mode: str, say: Callable[[str], None]) -> tuple[Mirror, Tail, list[Row]]:
    """Open the mirror of a run and send it the rows before this life, or all in mode `sync`; return the others too."""
    config = parse(["--config", str(run_dir / "config.yaml")])
    tail = Tail(run_dir / "metrics.jsonl")
    rows = tail.rows()
    last = max((number for number, row in enumerate(rows) if row["event"] == "start"), default=0)
    mirror = Mirror(config, run_dir, rows[last], say)
    before, newest = (rows, rows[-1]) if mode == "sync" else (rows[:last], rows[last])
    count = sum(row["event"] in MIRRORED for row in before) + (end_row(run_dir, newest["step"]) is not None)
    mirror.begin(mode, count)
    for row in before:
        mirror.send(row)
    return mirror, tail, rows[len(before) :]


def follow(run_dir: Path, mode: str) -> None:
    """Mirror a run that trains, until a line on standard input says that it has ended, and with which error."""
    farewell: list[str | None] = []
    is_over = threading.Event()

    def listen() -> None:
        line = sys.stdin.readline()
        if not line:  # training was killed: a restart or `launch sync` sends the rest
            os._exit(1)
        farewell.append(json.loads(line))
        is_over.set()

    threading.Thread(target=listen, daemon=True).start()
    mirror, tail, waiting = open_mirror(run_dir, mode, lambda line: print(line, flush=True))
    mirror.send_code()
    over = False
    while not over:
        over = is_over.wait(POLL_SECONDS)  # before the rows are read: all were written before
        waiting += tail.rows()
        for row in waiting:
            mirror.send(row)
            if row["event"] == "preempted":
                mirror.alert("preempted", f"at step {row['step']} by {row['signal']}", "WARN")
        waiting.clear()
    if farewell[0] is not None:
        mirror.alert("failed", farewell[0], "ERROR")
    mirror.end()
    mirror.wandb.teardown()


def sync(run_dir: Path) -> str:
    """Send W&B what it lacks of a run that has ended; return one line. Raises ConnectionError if that fails."""
    try:
        mirror, _, _ = open_mirror(run_dir.resolve(), "sync", lambda line: None)
        mirror.end()
    except Exception as error:
        raise ConnectionError(brief(error)) from error
    lacking = max(0, mirror.given - mirror.position)
    return f"{run_dir}: {lacking} of {mirror.given} rows sent, W&B had the others; {mirror.run.url}"


def main(run_dir: Path, mode: str) -> None:
    """Be the process that follows a run. Training decides when it ends, so signals to all processes of a job do not end it."""
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        follow(run_dir, mode)
    except Exception as error:  # never the training's problem, whatever it is
        print(f"wandb: stopped ({brief(error)}); {remedy(run_dir)}", flush=True)
    os._exit(0)  # wandb would wait at exit for a server that does not answer


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""One record per event -> metrics.jsonl, the console, a progress bar and W&B. Rank 0 only; other ranks hold a silent one.

metrics.jsonl is the record: a row per event, flushed at once, keyed by step. A resume drops the rows of steps that will be
computed again, so no row is doubled or missing. W&B is a mirror of it (`tracking.py`).
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.config import Config
from train.rundir import parse_rows
from train.tracking.tracker import Tracker, histograms, mode_of

if TYPE_CHECKING:
    from torch import nn

PLAIN_LINE_SECONDS = 5.0
LIFE_EVENTS = (
    "start",
    "preempted",
    "save_failed",
)  # what happened to the processes: stays when steps are computed again


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the whole rows of a metrics.jsonl; a torn last line, which a kill can leave, is not one."""
    return parse_rows(path.read_text(errors="replace")) if path.is_file() else []


def drop_after(path: Path, step: int, staging: Path | None = None) -> list[dict[str, Any]]:
    """Rewrite a metrics.jsonl without the rows of later steps and return what stays; atomic, prepared in `staging`."""
    rows = [row for row in read_rows(path) if row["step"] <= step or row["event"] in LIFE_EVENTS]
    temporary = (staging or path.parent) / (path.name + ".writing")
    with open(temporary, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return rows


class Metrics:
    """The outlets of one process's records; all of them closed on ranks other than 0. A context manager."""

    def __init__(self, config: Config, run_dir: Path, *, is_main: bool, total_steps: int) -> None:
        self.config, self.path, self.is_main, self.total_steps = config, run_dir / "metrics.jsonl", is_main, total_steps
        self.console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self.shows_progress = config.log.progress and is_main
        self.file: Any = None
        self.unwritten = b""  # rows that a full disk did not take yet
        self.tracker: Tracker | None = None
        self.progress: Progress | None = None
        self.last_line = 0.0

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every outlet."""
        if self.progress:
            self.progress.stop()
        if self.file:
            self.file.close()
        if self.tracker:
            self.tracker.close(error)

    def open(self, step: int, staging: Path | None = None) -> list[dict[str, Any]]:
        """Go on after `step`; return the rows that were kept."""
        if not self.is_main:
            return []
        rows = drop_after(self.path, step, staging)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        if self.shows_progress and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self.progress = Progress(TextColumn("step"), *columns, console=self.console)
            self.task = self.progress.add_task("train", total=self.total_steps, completed=step, text="")
            self.progress.start()
        return rows

    def flush(self) -> None:
        """Hand the rows that are not written yet to the system; raise OSError if the disk takes them no more."""
        while self.file and self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def sync(self) -> None:
        """Put all rows on the disk; raise OSError if it takes them no more."""
        self.flush()
        if self.file:
            os.fsync(self.file.fileno())

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, markup=False)

    def record(self, event: str, step: int, **values: Any) -> None:
        """Write one row and show it. Values are JSON. The first row, `start`, starts W&B."""
        if not self.is_main:
            return
        row = {"event": event, "step": step, **values, "time": round(time.time(), 3)}
        self.unwritten += (json.dumps(row) + "\n").encode()
        with contextlib.suppress(OSError):  # later, then; `save` insists
            self.flush()
        if event == "start" and mode_of(self.config) != "disabled":
            self.tracker = Tracker(self.config, self.path.parent, self.say)
        if event == "eval":
            split = f"{'averaged weights, ' if values.get('ema') else ''}{values['split']}"
            self.say(f"step {step}: {split} accuracy {values['accuracy']:.2%}, loss {values['loss']:.4f}")
        elif event == "train" and self.shows_progress and values["loss"] is not None:
            self._show(step, values)

    def record_weights(self, step: int, model: "nn.Module") -> None:
        """Write the histograms of a model's parameters, if W&B shows them."""
        if self.tracker and self.config.wandb.histograms:
            self.record("weights", step, **histograms(dict(model.named_parameters())))

    def _show(self, step: int, values: dict[str, Any]) -> None:
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.4g}  {values['images_per_second']:,.0f} images/s"
        if self.progress:
            self.progress.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS or step == self.total_steps:
            self.last_line = time.monotonic()
            left = values["seconds_left"]
            self.say(f"step {step}/{self.total_steps}  epoch {values['epoch']:.2f}  {text}  {left:.0f} s left")
            sys.stdout.flush()

"""Write a row per event to metrics.jsonl, and show it on the console, in a progress bar and in W&B. On rank 0 only.

metrics.jsonl is the record: each row is written at once and has its step. A resume removes the rows of steps that are
computed again, so no row is doubled or missing. W&B follows the file (`wandb.py`).
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn

from train.config import LogConfig, WandbConfig
from train.rundir import Row, RunDir, sync
from train.tracking.wandb import Follower

PLAIN_LINE_SECONDS = 5.0
NUM_BINS = 64


def histogram(values: Tensor) -> list[Any] | None:
    """Return [smallest value, largest value, counts in NUM_BINS equal bins]; None for constant or non-finite values."""
    values = values.detach().float().cpu().flatten()  # a host-device sync; histc is not deterministic on a GPU
    low, high = (float(edge) for edge in values.aminmax())
    has_bins = bool(values.isfinite().all()) and low < high
    return [low, high, values.histc(NUM_BINS, low, high).int().tolist()] if has_bins else None


class Metrics:
    """Where the rows of one process go: nowhere on ranks other than 0. A context manager."""

    def __init__(self, log: LogConfig, wandb: WandbConfig, run_dir: RunDir, *, is_main: bool) -> None:
        self.wandb, self.run_dir, self.is_main, self.total_steps = wandb, run_dir, is_main, 0
        # $FORCE_COLOR and the like would draw a bar into a file
        is_terminal = sys.stdout.isatty()
        self.console = Console(quiet=not is_main, force_terminal=is_terminal, highlight=False, soft_wrap=True)
        self.should_show_progress = log.progress and is_main
        self.file: Any = None
        self.unwritten = b""  # rows for which a full disk had no room yet
        self.follower: Follower | None = None
        self.progress: Progress | None = None
        self.last_line = 0.0

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, the progress bar and W&B."""
        if self.progress:
            self.progress.stop()
        if self.file:
            self.file.close()
        if self.follower:
            self.follower.close()

    def open(self, step: int, total_steps: int, staging: Path | None = None) -> list[Row]:
        """Open metrics.jsonl without the rows after `step`; return the rows that it keeps."""
        if not self.is_main:
            return []
        self.total_steps = total_steps
        rows = self.run_dir.remove_rows_after(step, staging)
        self.file = open(self.run_dir.metrics, "ab", buffering=0)  # noqa: SIM115
        if self.should_show_progress and self.console.is_terminal and not self.console.is_dumb_terminal:
            columns = ("step", BarColumn(), MofNCompleteColumn(), "{task.fields[text]}", TimeRemainingColumn())
            self.progress = Progress(*columns, console=self.console)
            self.task = self.progress.add_task("train", total=total_steps, completed=step, text="")
            self.progress.start()
        return rows

    def flush(self) -> None:
        """Write the rows that are not written yet. Raises OSError if the disk has no room."""
        while self.file and self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def sync(self) -> None:
        """Put all rows on the disk. Raises OSError if it has no room."""
        self.flush()
        if self.file:
            sync(self.file.fileno())

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, markup=False)

    def record(self, event: str, step: int, **values: Any) -> None:
        """Write one row of JSON values and show it. The first row, `start`, starts W&B."""
        if not self.is_main:
            return
        row = {"event": event, "step": step, **values, "time": round(time.time(), 3)}
        self.unwritten += (json.dumps(row) + "\n").encode()
        with contextlib.suppress(OSError):  # the next row tries again, and a checkpoint requires it
            self.flush()
        if event == "start" and self.wandb.mode != "disabled":
            self.follower = Follower(self.wandb, self.run_dir.path, self.say)
        if event == "eval":
            split = f"{'averaged weights, ' if values.get('ema') else ''}{values['split']}"
            self.say(f"step {step}: {split} accuracy {values['accuracy']:.2%}, loss {values['loss']:.4f}")
        elif event == "train" and self.should_show_progress and values["loss"] is not None:
            self._show(step, values)

    def record_weights(self, step: int, model: nn.Module) -> None:
        """Write the histograms of a model's parameters, if W&B shows them."""
        if self.follower and self.wandb.media:
            found = {name: histogram(tensor) for name, tensor in model.named_parameters()}
            self.record("weights", step, **{name: bins for name, bins in found.items() if bins})

    def _show(self, step: int, values: dict[str, Any]) -> None:
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.4g}  {values['images_per_second']:,.0f} images/s"
        if self.progress:
            self.progress.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS or step == self.total_steps:
            self.last_line = time.monotonic()
            left = values["seconds_left"]
            self.say(f"step {step}/{self.total_steps}  epoch {values['epoch']:.2f}  {text}  {left:.0f} s left")
            sys.stdout.flush()

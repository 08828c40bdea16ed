"""One record per event -> metrics.jsonl, the console, a progress bar and W&B. Rank 0 only; other ranks hold a silent one.

metrics.jsonl is the record: a row per event, flushed at once, keyed by step. A resume drops the rows of steps that will be
computed again, so no row is doubled or missing. W&B is a mirror of it and never in the way of training.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.config import Config
from train.report import parse_rows

PLAIN_LINE_SECONDS = 5.0
LIFE_EVENTS = ("start", "preempted", "save_failed")  # what happened to the processes: stays when steps are computed again
EVIDENCE_EVENTS = ("fingerprint", "saved")  # bits and hashes: for the file only
WANDB_START_SECONDS, WANDB_FINISH_SECONDS = 2, 5


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the whole rows of a metrics.jsonl; a torn last line, which a kill can leave, is not one."""
    return parse_rows(path.read_text(errors="replace")) if path.is_file() else []


def drop_after(path: Path, step: int, staging: Path | None = None) -> list[dict[str, Any]]:
    """Rewrite a metrics.jsonl without the rows of later steps and return what stays; atomic, prepared in `staging`."""
    rows = [row for row in read_rows(path) if row["step"] <= step or row["event"] in LIFE_EVENTS]
    temporary = (staging or path.parent) / (path.name + ".writing")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)
    return rows


def wandb_id(run_dir: Path) -> str:
    """The W&B id of a run, made once and kept beside it, so that a resume goes on in the same W&B run."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def start_wandb(config: Config, run_dir: Path, facts: dict[str, Any]) -> tuple[Any, str]:
    """Start the W&B mirror -> (run or None, one line that says what was started). Never raises for a server's sake."""
    mode = config.wandb.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "auto")  # type: ignore[assignment]
    if mode == "disabled":
        return None, "wandb: disabled"
    os.environ.setdefault("WANDB_X_DISABLE_VIEWER", "true")  # else an unreachable server costs 16 s and more
    os.environ.setdefault("WANDB_DATA_DIR", str(run_dir / "wandb"))
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    def init(mode: str) -> Any:
        options = config.wandb
        settings = wandb.Settings(init_timeout=WANDB_START_SECONDS, finish_timeout=WANDB_FINISH_SECONDS, console="off")
        run = wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group,
            notes=options.notes,
            tags=options.tags,
            config={**dataclasses.asdict(config), **facts},
            name=run_dir.name,
            id=wandb_id(run_dir),
            resume="allow",
            dir=str(run_dir),
            mode=mode,  # type: ignore[arg-type]
            settings=settings,
        )
        run.define_metric("*", step_metric="step")
        return run

    why = ""
    if mode in ("auto", "online"):
        try:
            run = init("online")
            return run, f"wandb: online, {run.url}"
        except (wandb.errors.Error, OSError) as error:
            why = " (" + " ".join(str(error).split())[:60] + ")"
            wandb.teardown()
    return init("offline"), f"wandb: offline{why}; `wandb sync {run_dir}/wandb/offline-run-*` uploads it"


class Metrics:
    """The outlets of one process's records; all of them closed on ranks other than 0. A context manager."""

    def __init__(self, config: Config, run_dir: Path, *, is_main: bool, total_steps: int) -> None:
        self.config, self.path, self.is_main, self.total_steps = config, run_dir / "metrics.jsonl", is_main, total_steps
        self.console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self.shows_progress = config.log.progress and is_main
        self.file: Any = None
        self.unwritten = b""  # rows that a full disk did not take yet
        self.wandb: Any = None
        self.progress: Progress | None = None
        self.last_line = 0.0

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close every outlet; W&B gets WANDB_FINISH_SECONDS."""
        if self.progress:
            self.progress.stop()
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish(exit_code=0 if kind is None else 1)

    def open(self, step: int, facts: dict[str, Any], staging: Path | None = None) -> list[dict[str, Any]]:
        """Go on after `step`; return the rows that were kept. `facts` go to W&B beside the config."""
        if not self.is_main:
            return []
        rows = drop_after(self.path, step, staging)
        self.wandb, line = start_wandb(self.config, self.path.parent, facts)
        self.say(line)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        if self.shows_progress and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self.progress = Progress(TextColumn("step"), *columns, console=self.console)
            self.task = self.progress.add_task("train", total=self.total_steps, completed=step, text="")
            self.progress.start()
        return rows

    def flush(self) -> None:
        """Write the rows that are not written yet; raise OSError if the disk takes them no more."""
        while self.file and self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, markup=False)

    def record(self, event: str, step: int, **values: Any) -> None:
        """Write one row and show it. Values are JSON scalars; W&B sees them as `event/name` beside `step`."""
        if not self.is_main:
            return
        row = {"event": event, "step": step, **values, "time": round(time.time(), 3)}
        self.unwritten += (json.dumps(row) + "\n").encode()
        with contextlib.suppress(OSError):  # later, then; `save` insists
            self.flush()
        if self.wandb and event not in EVIDENCE_EVENTS:
            group = "eval_ema" if values.get("ema") else event  # both are evaluated at one step
            numbers = {f"{group}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
            self.wandb.log({"step": step, **numbers})
        if event == "eval":
            split = f"{'averaged weights, ' if values.get('ema') else ''}{values['split']}"
            self.say(f"step {step}: {split} accuracy {values['accuracy']:.2%}, loss {values['loss']:.4f}")
        elif event == "train" and self.shows_progress and values["loss"] is not None:
            self._show(step, values)

    def _show(self, step: int, values: dict[str, Any]) -> None:
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.4g}  {values['images_per_second']:,.0f} images/s"
        if self.progress:
            self.progress.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS or step == self.total_steps:
            self.last_line = time.monotonic()
            left = values["seconds_left"]
            self.say(f"step {step}/{self.total_steps}  epoch {values['epoch']:.2f}  {text}  {left:.0f} s left")
            sys.stdout.flush()

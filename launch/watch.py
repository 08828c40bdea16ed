"""`python -m launch watch RUN`: show a run's progress in the terminal, from its metrics.jsonl alone.

Invariant: it only reads, so the run may be anyone's, on another machine, running or not. The file is read anew when it has
changed: a resume replaces it, and its last line may be torn.
"""

import contextlib
import itertools
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train.cli import Parser
from train.errors import UserError
from train.report.records import Record, parse_rows

EVERY_SECONDS = 1.0
QUIET_SECONDS = 60.0  # without a row for longer than that, and than five rows usually take, something may be wrong
BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 24) -> str:
    """A curve of blocks, one per value; of many values the last of each stretch."""
    stride = -(-len(values) // width) or 1
    shown = values[::-1][::stride][::-1]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return "".join(BLOCKS[round((value - low) / ((high - low) or 1) * (len(BLOCKS) - 1))] for value in shown)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(round(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def read(run_dir: Path) -> Record | None:
    """What metrics.jsonl says by now; None while there is no row. Raises UserError if it cannot be read."""
    try:
        rows = parse_rows((run_dir / "metrics.jsonl").read_text(errors="replace"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{run_dir / 'metrics.jsonl'} cannot be read: {error.strerror}. Expected a run's directory."
        ) from error
    return Record(run_dir, run_dir.resolve().name, rows, {}, {}) if rows else None


def has_ended(record: Record) -> bool:
    """Whether the last step was evaluated and saved, after which a run has nothing left to do."""
    return saved_step(record) == record.total_steps


def saved_step(record: Record) -> int:
    """The step of the newest checkpoint; -1 if there is none. A save writes its row first, and another one if it fails."""
    failed = record.last("save_failed").get("step")
    return next((step for step in reversed(record.series("saved", "step")[0]) if step != failed), -1)


def pulse(record: Record, now: float) -> tuple[str, str]:
    """Whether the run moves -> (words, style)."""
    last, ages = record.rows[-1], [row["time"] for row in record.rows if "time" in row]
    age = max(now - ages[-1], 0.0) if ages else 0.0
    since = f"last row {duration(age)} ago"
    if has_ended(record):
        return "finished", "bold green"
    if last["event"] == "preempted":
        return f"preempted by {last.get('signal')}, {since}; waiting for it to go on", "bold yellow"
    usual = sorted(after - before for before, after in itertools.pairwise(ages))
    is_quiet = age > max(QUIET_SECONDS, 5 * usual[len(usual) // 2] if usual else 0.0)
    return (f"no news: {since}. Is it still running?", "bold red") if is_quiet else (f"running, {since}", "green")


def lines(record: Record) -> list[tuple[str, str, str]]:
    """What there is to say, as (name, value, sparkline)."""
    trained, evaluated, saved = record.last("train"), record.last("eval"), saved_step(record)
    lives = record.lives
    sizes = " → ".join(str(life.world_size) for life in lives[-4:])
    losses, accuracies = record.series("train", "loss")[1], record.series("eval", "accuracy", record.averages)[1]
    found = []
    if trained:
        loss = "not finite" if trained["loss"] is None else f"{trained['loss']:.4f}"
        found += [
            ("loss", loss, sparkline([math.log(max(value, 1e-9)) for value in losses])),
            ("learning rate", f"{trained['lr']:.4g}", ""),
        ]
        found += [("images/s", f"{trained['images_per_second']:,.0f}", "")]
        found += [("time left", duration(trained["seconds_left"]), "")]
    if evaluated:
        where = f"{evaluated['split']}, step {evaluated['step']:,}{', averaged' if record.averages else ''}"
        found.insert(1, ("accuracy", f"{evaluated['accuracy']:.2%} ({where})", sparkline(accuracies)))
    found += [("processes", sizes or "?", ""), ("restarts", str(max(len(lives) - 1, 0)), "")]
    return [*found, ("checkpoint", f"step {saved:,}" if saved >= 0 else "none yet", "")]


def frame(run_dir: Path, record: Record | None, now: float) -> Group:
    """One picture of the run."""
    if record is None:
        return Group(Text(f"{run_dir}: waiting for its first row"))
    words, style = pulse(record, now)
    step, total = record.rows[-1]["step"], record.total_steps
    epoch = record.last("train").get("epoch", 0.0)
    bar = Table.grid(padding=(0, 2))
    count = f"step {step:,}" + (f" of {total:,}  {step / max(total, 1):.0%}" if total else "") + f"  epoch {epoch:.2f}"
    bar.add_row(*([ProgressBar(total=total, completed=step, width=40)] if total else []), count)
    table = Table.grid(padding=(0, 2))
    for name, value, curve in lines(record):
        table.add_row(Text(name, "dim"), Text(value, "bold"), Text(curve, "cyan"))
    warning = "THE FALLBACK DATA SET, NOT WHAT WAS ASKED FOR" if record.data.get("is_fallback") else ""
    head = Text.assemble((record.name, "bold"), "  ", f"{record.data_name}  ", (words, style))
    return Group(head, *([Text(warning, "bold white on red")] if warning else []), bar, table)


def stamp(run_dir: Path) -> tuple[Any, ...] | None:
    """What changes when metrics.jsonl grows or is replaced; None if there is none."""
    try:
        status = (run_dir / "metrics.jsonl").stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def follow(run_dir: Path, console: Console) -> None:
    """Show the run until it ends or the person leaves."""
    record, seen = read(run_dir), stamp(run_dir)
    with Live(frame(run_dir, record, time.time()), console=console, auto_refresh=False) as live:
        while not (record and has_ended(record)):
            time.sleep(EVERY_SECONDS)
            if (now := stamp(run_dir)) != seen:
                record, seen = read(run_dir) or record, now
            live.update(frame(run_dir, record, time.time()), refresh=True)


def main(argv: list[str]) -> int:
    """Show the run; return exit code 0. Raises UserError."""
    parser = Parser(prog="python -m launch watch", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run; may come into being later")
    parser.add_argument(
        "--once", action="store_true", help="print one picture and leave; so it is where there is no terminal"
    )
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    if options.once or not console.is_terminal:
        record = read(options.run)
        if record is None:
            raise UserError(
                f"{options.run} has no rows in metrics.jsonl. Expected a run's directory, such as runs/mnist."
            )
        console.print(frame(options.run, record, time.time()))
        return 0
    with contextlib.suppress(KeyboardInterrupt):  # leaving is no failure
        follow(options.run, console)
    return 0

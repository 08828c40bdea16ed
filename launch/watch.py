"""`python -m launch watch RUN`: show a run's progress in the terminal. It only reads metrics.jsonl, from anywhere."""

import contextlib
import itertools
import math
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train.cli import Parser
from train.errors import FINISHED, UserError
from train.report.charts import sparkline
from train.report.records import Record, banner, duration, facts
from train.rundir import EXAMPLE, RunDir


def read(run_dir: Path) -> Record | None:
    """Read the rows of a run; None if it has none yet. Raises UserError if they cannot be read."""
    rows = RunDir(run_dir).read_rows()
    return Record(run_dir, RunDir(run_dir).name, rows, None, {}) if rows else None


def pulse(record: Record, now: float) -> tuple[str, str]:
    """Return in words whether the run makes progress, and the words' style."""
    last, times = record.rows[-1], [row["time"] for row in record.rows if "time" in row] or [now]
    since = f"last row {duration(now - times[-1])} ago"
    if record.saved_step == record.total_steps:  # evaluated before; nothing is left to do
        return "finished", "bold green"
    if last["event"] == "preempted":
        return f"preempted by {last.get('signal')}, {since}; waiting for it to resume", "bold yellow"
    gaps = [after - before for before, after in itertools.pairwise(times)] or [0.0]
    is_quiet = now - times[-1] > max(60.0, 5 * statistics.median(gaps))  # seconds; five rows usually take less
    return (f"no news: {since}. Is it still running?", "bold red") if is_quiet else (f"running, {since}", "green")


def frame(run_dir: Path, record: Record | None) -> Group:
    """Return a picture of the run."""
    if record is None:
        return Group(Text(f"{run_dir}: waiting for its first row"))
    table = Table.grid(padding=(0, 2))

    def add(name: str, value: str, curve: RenderableType = "") -> None:
        table.add_row(Text(name, "dim"), Text(value, "bold"), curve)

    trained, evaluated, known = record.last("train"), record.last("eval"), facts([record])
    step, total = record.last_step, record.total_steps or 0
    count = f"{step:,} of {total:,}  {step / max(total, 1):.0%}  epoch {trained.get('epoch', 0.0):.2f}"
    add("step", count, ProgressBar(total, step, width=24))
    if trained:
        losses = [math.log(max(value, 1e-9)) for value in record.series("train", "loss").values()]
        add("loss", "not finite" if trained["loss"] is None else f"{trained['loss']:.4f}", sparkline(losses))
        add("learning rate", f"{trained['lr']:.4g}")
        add("images/s", known["images/s"])
        add("time left", duration(trained["seconds_left"]))
    if evaluated:
        where = f"{evaluated['split']}, step {evaluated['step']:,}{', averaged' if record.is_averaged else ''}"
        accuracies = [*record.series("eval", "accuracy").values()]
        add("accuracy", f"{known['accuracy']} ({where})", sparkline(accuracies))
    add("processes", known["processes"])
    add("checkpoint", "none yet" if record.saved_step < 0 else f"step {record.saved_step:,}")
    head = Text.assemble((record.name, "bold"), f"  {record.data_name}  ", pulse(record, time.time()))
    warning = banner([record])
    return Group(head, *([Text(warning, "bold white on red")] if warning else []), table)


def main(argv: list[str]) -> int:
    """Show the run until it ends or the reader leaves; return exit code 0. Raises UserError."""
    parser = Parser(prog="python -m launch watch", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run; may be created later")
    run = parser.parse_args(argv).run
    console, record = Console(highlight=False, force_terminal=sys.stdout.isatty()), read(run)
    if not console.is_terminal:
        if record is None:
            raise UserError(f"{run} has no rows in metrics.jsonl. Expected a run, such as {EXAMPLE}.")
        console.print(frame(run, record))
        return FINISHED
    live = Live(frame(run, record), console=console, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), live:
        while not (record and record.saved_step == record.total_steps):
            time.sleep(1)
            record = read(run) or record
            live.update(frame(run, record), refresh=True)
    return FINISHED

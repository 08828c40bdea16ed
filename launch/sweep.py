"""`python -m launch sweep DIR`: a table of the runs in a directory, with mean and standard deviation."""

import json
import statistics
from pathlib import Path

from train.cli import Parser
from train.errors import UserError


def table(directory: Path) -> str:
    """The table of all runs in `directory`; a run without a finished summary counts as unfinished."""
    runs = sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    if not runs:
        raise UserError(f"{directory} holds no runs. Give the directory that holds the runs of a sweep.")
    lines, values = [f"{'run':24} {'accuracy':>9} {'step':>7}  weights"], []
    for run in runs:
        try:
            summary = json.loads((run / "summary.json").read_text())
        except (OSError, ValueError):
            summary = {}
        if summary.get("outcome") != "finished":
            lines.append(f"{run.name:24} {'not finished':>9}")
            continue
        # the averaged weights are what a run with optim.ema is for
        accuracy = next(
            v for name, v in sorted(summary.items()) if name.endswith(("test_accuracy", "validation_accuracy"))
        )
        values.append(accuracy)
        lines.append(f"{run.name:24} {accuracy:9.2%} {summary['step']:7}  {summary['weights_sha256'][:16]}")
    spread = f" +- {statistics.stdev(values):.2%}" if len(values) > 1 else ""
    mean = f"mean {statistics.mean(values):.2%}{spread} (standard deviation)" if values else "none is finished"
    return "\n".join([*lines, f"{len(values)} of {len(runs)} runs: {mean}"])


def main(argv: list[str]) -> int:
    """Print the table of one directory."""
    parser = Parser(prog="python -m launch sweep", description=__doc__)
    parser.add_argument("directory", type=Path, help="directory that holds the runs, such as runs/sweep-42")
    print(table(parser.parse_args(argv).directory))
    return 0

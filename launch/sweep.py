"""`python -m launch sweep DIR`: a table of the runs in a directory, with mean and standard deviation."""

import statistics
from pathlib import Path

from train.cli import Parser
from train.errors import UserError
from train.rundir import RunDir


def table(directory: Path) -> str:
    """Return the table of all runs in `directory`. A run without a finished summary counts as unfinished."""
    runs = sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    if not runs:
        raise UserError(f"{directory} holds no runs. Expected the directory of a sweep, such as runs/sweep-42.")
    width = max(24, *(len(run.name) for run in runs))
    lines, accuracies = [f"{'run':{width}} {'accuracy':>9} {'step':>7}  weights"], []
    for run in runs:
        try:
            summary = RunDir(run).read_summary()
        except UserError as error:
            lines.append(f"{run.name:{width}} {error}")
            continue
        if summary and summary.outcome == "finished" and summary.final:
            accuracies.append(summary.final.accuracy)
            lines.append(f"{run.name:{width}} {accuracies[-1]:9.2%} {summary.step:7}  {summary.weights_sha256[:16]}")
        else:
            lines.append(f"{run.name:{width}} {'not finished':>9}")
    mean = f"mean {statistics.mean(accuracies):.2%}" if accuracies else "none is finished"
    if len(accuracies) > 1:
        mean += f" +- {statistics.stdev(accuracies):.2%} (standard deviation)"
    return "\n".join([*lines, f"{len(accuracies)} of {len(runs)} runs: {mean}"])


def main(argv: list[str]) -> int:
    """Print the table of one directory; return exit code 0. Raises UserError."""
    parser = Parser(prog="python -m launch sweep", description=__doc__)
    parser.add_argument("directory", type=Path, help="directory that holds the runs, such as runs/sweep-42")
    print(table(parser.parse_args(argv).directory))
    return 0

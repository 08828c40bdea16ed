"""`python -m launch sync RUN [RUN ...]`: send W&B what it lacks of runs that have ended, from their directories."""

import sys
from pathlib import Path

from train.cli import Parser
from train.errors import CRASHED, FINISHED, UserError
from train.rundir import EXAMPLE, RunDir


def main(argv: list[str]) -> int:
    """Send each run and print what was sent. Return the exit code: 0, or 1 if W&B could not be reached."""
    parser = Parser(prog="python -m launch sync", description=__doc__)
    runs = "directory of a run that has ended, such as runs/mnist"
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help=runs)
    options = parser.parse_args(argv)
    from train.tracking import tracker

    for run in map(RunDir, options.runs):
        if not run.config.is_file() or not run.read_rows():
            raise UserError(f"{run.path} is no run with rows. Expected the directory of a run, such as {EXAMPLE}.")
    for path in options.runs:
        try:
            print(tracker.sync(path), flush=True)
        except ConnectionError as error:
            problem = str(error).rstrip(".")
            print(f"error: {path} was not sent: {problem}. Try again later: nothing is lost.", file=sys.stderr)
            return CRASHED
    return FINISHED

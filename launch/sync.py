"""`python -m launch sync RUN [RUN ...]`: send W&B what it lacks of runs that have ended, from their directories."""

import sys
from pathlib import Path

from train.cli import Parser
from train.errors import UserError


def main(argv: list[str]) -> int:
    """Send each run, and say what was sent; return the exit code: 0, 1 if W&B could not be reached, 2 for bad input."""
    parser = Parser(prog="python -m launch sync", description=__doc__)
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="directory of a run that has ended, such as runs/mnist"
    )
    options = parser.parse_args(argv)
    from train.tracking import tracker

    for run_dir in options.runs:
        if not (run_dir / "config.yaml").is_file() or not tracker.Tail(run_dir / "metrics.jsonl").rows():
            raise UserError(
                f"{run_dir} is no run with rows. Expected the directory of a run, such as runs/mnist-20260101-120000."
            )
    for run_dir in options.runs:
        try:
            print(tracker.sync(run_dir), flush=True)
        except ConnectionError as error:
            print(
                f"error: {run_dir} was not sent: {str(error).rstrip('.')}. Try again later: nothing is lost.",
                file=sys.stderr,
            )
            return 1
    return 0

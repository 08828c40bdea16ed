"""`python -m launch sync RUN [RUN ...]`: send W&B what it lacks of runs that have ended, from their directories."""

import argparse
import sys
from pathlib import Path

from train.config import UserError


def main(argv: list[str]) -> int:
    """Send each run, and say what was sent; return the exit code: 0, 1 if W&B could not be reached, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m launch sync", description=__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="directory of a run that has ended, such as runs/mnist")
    options = parser.parse_args(argv)
    for run_dir in options.runs:
        for name in ("metrics.jsonl", "config.yaml"):
            if not (run_dir / name).is_file() or not (run_dir / name).stat().st_size:
                raise UserError(
                    f"{run_dir} has no {name}, or an empty one. Expected the directory of a run, such as runs/mnist-20260101-120000."
                )
    from train import tracking

    for run_dir in options.runs:
        try:
            print(tracking.sync(run_dir), flush=True)
        except ConnectionError as error:
            print(f"error: {run_dir} was not sent: {error}. Try again later: nothing is lost.", file=sys.stderr)
            return 1
    return 0

"""`python -m launch sync RUN [RUN ...]`: send W&B the missing rows of runs that have ended, from their directories."""

import sys
from pathlib import Path

from train.cli import Parser
from train.errors import CRASHED, FINISHED, UserError
from train.rundir import EXAMPLE, RunDir
from train.tracking import wandb


def main(argv: list[str]) -> int:
    """Send each run and print what was sent. Return the exit code: 0, or 1 if W&B cannot be reached."""
    parser = Parser(prog="python -m launch sync", description=__doc__)
    help_text = f"directory of a run that has ended, such as {EXAMPLE}"
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help=help_text)
    runs = parser.parse_args(argv).runs
    for run_dir in map(RunDir, runs):
        run_dir.require_config()
        if not run_dir.read_rows():
            raise UserError(f"{run_dir.path} has no rows. Expected the directory of a run, such as {EXAMPLE}.")
    for path in runs:
        try:
            print(wandb.sync(path), flush=True)
        except ConnectionError as error:
            reason = str(error).rstrip(".")
            print(f"error: {path} was not sent: {reason}. Try again later: nothing is lost.", file=sys.stderr)
            return CRASHED
    return FINISHED

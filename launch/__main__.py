"""`python -m launch SUBCOMMAND ...`: one file per subcommand, imported when it is called."""

import importlib
import sys

from train import __version__
from train.config import UserError

SUBCOMMANDS = {
    "run": "train on this machine: one process per GPU, restarts, signals and exit codes passed on",
    "demo": "train one run on 1, 2 and 4 processes, kill one, and compare the bits",
    "bench": "measure what exact mode costs",
    "data": "download and verify a data set",
    "report": "draw a picture of one or several runs",
    "sync": "send W&B what it lacks of runs that were offline, killed or cut off",
    "compare": "say where two runs differ: mathematics, losses, gradient norms, weights",
    "replay": "compute steps of an exact run again and compare their bits",
    "selftest": "prove on this machine, in half a minute, that kills and world sizes change nothing",
    "model": "print a model's layers, volumes and parameters",
}


def main(argv: list[str]) -> int:
    """Dispatch to a subcommand; return its exit code."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print("usage: python -m launch SUBCOMMAND ... (each has --help)\n")
        print("\n".join(f"  {subcommand:10} {text}" for subcommand, text in SUBCOMMANDS.items()))
        return 0
    if name == "--version":
        print(f"lockstep {__version__}")
        return 0
    try:
        if name not in SUBCOMMANDS:
            raise UserError(f"There is no subcommand {name}. Use one of: {', '.join(SUBCOMMANDS)}.")
        return importlib.import_module(f"launch.{name}").main(argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

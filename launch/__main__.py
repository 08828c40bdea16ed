"""`python -m launch SUBCOMMAND ...`: each subcommand is a module, imported when it is called.

Exit codes: those of training, 130 after Ctrl-C, 141 if the reader of the output has left.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before a train.py in the current directory

from train import __version__
from train.errors import BAD_INPUT, CRASHED, FINISHED, INTERRUPTED, RunError, UserError, did_you_mean
from train.world.process import keep_others_from_writing, protect_output

ROOMS = {  # subcommands whose module is not next to this file, or whose function is not main
    "bench": "launch.bench.harness",
    "compare": "launch.check.compare",
    "demo": "launch.check.selftest:demo",
    "doctor": "launch.check.doctor",
    "export": "launch.deploy.export",
    "predict": "launch.deploy.predict",
    "replay": "launch.check.replay",
    "selftest": "launch.check.selftest",
}
SUBCOMMANDS = {
    "run": "train on this machine: one process per GPU, restarts, signals and exit codes passed on",
    "slurm": "check a training and submit it to a Slurm cluster",
    "sweep": "print a table of the runs in a directory, with mean and standard deviation",
    "demo": "train one run on 1, 2 and 4 processes, kill one, and compare the bits",
    "bench": "measure: throughput, peers, exact mode's cost, scaling, start-up, time to accuracy",
    "data": "download and verify a data set",
    "report": "write a page about one or several runs",
    "export": "write a run's best checkpoint to one verified file with a model card",
    "predict": "classify PNG or JPEG images",
    "watch": "show a run's progress in the terminal",
    "sync": "send W&B what it lacks of runs that were offline, killed or cut off",
    "compare": "show where two runs differ: config, losses, gradient norms, weights",
    "replay": "compute steps of an exact run again and compare their bits",
    "selftest": "show on this machine, in half a minute, that kills and world sizes change nothing",
    "plan": "show what a run would do on N nodes of G GPUs: shares, lr, bytes, the command",
    "doctor": "check this machine, or a Slurm cluster, and print how to repair it",
}


def dispatch(argv: list[str]) -> int:
    """Call a subcommand; return its exit code."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print("usage: python -m launch SUBCOMMAND ... (each has --help)\n")
        print("\n".join(f"  {subcommand:10} {text}" for subcommand, text in SUBCOMMANDS.items()))
        return FINISHED
    if name == "--version":
        print(f"lockstep {__version__}")
        return FINISHED
    if name not in SUBCOMMANDS:
        hint = did_you_mean(name, list(SUBCOMMANDS), f"Use one of: {', '.join(SUBCOMMANDS)}.")
        raise UserError(f"There is no subcommand {name}. {hint}")
    module, _, function = ROOMS.get(name, f"launch.{name}").partition(":")
    return getattr(importlib.import_module(module), function or "main")(argv[1:])


def main(argv: list[str]) -> int:
    """Call a subcommand and print its error, if it has one, as a line; return the exit code."""
    keep_others_from_writing()
    try:
        try:
            return dispatch(argv)
        finally:
            sys.stdout.flush()  # here, where a full disk is an error in one line
    except KeyboardInterrupt:
        return INTERRUPTED
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, UserError) else CRASHED


if __name__ == "__main__":
    protect_output(is_required=sys.argv[1:2] != ["run"])  # a training does not depend on what it prints
    sys.exit(main(sys.argv[1:]))

"""`python -m launch report RUN [RUN ...]`: draw a picture of one or several runs."""

import sys
from pathlib import Path

from train.cli import Parser
from train.config import UserError
from train.picture import picture


def main(argv: list[str]) -> int:
    """Draw the picture and say where it is; return the exit code: 0, or 2 with one line about what was given wrongly."""
    parser = Parser(prog="python -m launch report", description=__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="directory of a run, such as runs/mnist")
    parser.add_argument("--output", metavar="FILE", type=Path, help="picture, .png or .svg (default: report.png in the last RUN)")
    options = parser.parse_args(argv)
    output = options.output or options.runs[-1] / "report.png"
    try:
        picture(options.runs, output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0

"""`python -m launch report RUN [RUN ...]`: write a page about one or several runs."""

from pathlib import Path

from train.cli import Parser
from train.errors import FINISHED
from train.report.page import write


def main(argv: list[str]) -> int:
    """Write the page and print where it is; return the exit code. Raises UserError."""
    parser = Parser(prog="python -m launch report", description=__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="directory of a run, such as runs/mnist")
    where = "page, .html (default: report.html in RUN, of several runs here)"
    parser.add_argument("--output", metavar="FILE", type=Path, help=where)
    options = parser.parse_args(argv)
    output = options.output or (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
    write(options.runs, output)
    print(output)
    return FINISHED

"""`python -m launch doctor`: check this machine, and with --slurm a cluster; each problem with its remedy.

The arguments of the training that is meant to run follow `--`: its data, precision, model and run directory are
checked. Exit codes: 0 nothing fails, 1 something does, 2 bad usage.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from launch.check import checks, cluster
from launch.check.checks import Finding
from train.cli import Parser, parse, split_arguments
from train.config import Config
from train.errors import CRASHED, FINISHED, UserError, one_line

Check = Callable[[Config], Iterator[Finding]]


def examine(todo: Sequence[tuple[str, Check]], config: Config) -> Iterator[Finding]:
    """Make all checks. One that breaks is a finding, and the others continue."""
    for name, check in todo:
        try:
            yield from check(config)
        except Exception as error:  # whatever is wrong with this machine, the rest of the report is wanted
            text = f"the check broke: {type(error).__name__}: {one_line(error, 150)}"
            yield Finding(name.replace("_", "-"), "fail", text, "repair that, or report it")


def main(argv: list[str]) -> int:
    """Check, print, and return 1 if anything fails."""
    usage = "%(prog)s [OPTIONS] [-- TRAIN ARGUMENTS]"
    parser = Parser(prog="python -m launch doctor", usage=usage, description=__doc__)
    parser.add_argument("--slurm", action="store_true", help="check the Slurm cluster too, by a short job on its nodes")
    parser.add_argument("--nodes", type=int, default=2, help="nodes of that job (default 2)")
    parser.add_argument("--partition", help="partition of that job (default: the cluster's)")
    parser.add_argument("--account", help="account of that job (default: yours)")
    own, arguments = split_arguments(argv)
    options = parser.parse_args(own)
    if options.nodes < 1:
        raise UserError(f"--nodes is {options.nodes}. Use 1 or more.")
    config = parse(arguments)
    todo: list[tuple[str, Check]] = [(check.__name__, check) for check in checks.CHECKS]
    if options.slurm:
        where = [f"--{name}={value}" for name in ("partition", "account") if (value := getattr(options, name))]
        todo.append(("slurm", functools.partial(cluster.slurm, nodes=options.nodes, where=where)))
    found: Counter[str] = Counter()
    for finding in examine(todo, config):
        found[finding.status] += 1
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        line = f"{finding.status:5}{finding.name:14}{finding.text}{remedy}"
        print(" ".join(line.splitlines()), flush=True)
    print(f"{sum(found.values())} checks: {found['fail']} fail, {found['warn']} warn")
    return CRASHED if found["fail"] else FINISHED

"""`python -m launch doctor`: check this machine, and with --slurm a cluster; each line is OK, warn or fail with its remedy.

Behind `--` stand the arguments of the training that is meant to run: its data, precision, model and run directory are the
ones that are looked at. Exit codes: 0 nothing fails, 1 something does, 2 bad usage.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence

from launch.check import checks, cluster
from launch.check.checks import Finding
from train.cli import Parser, parse, split_arguments
from train.config import Config
from train.errors import UserError

Check = Callable[[Config], Iterator[Finding]]


def examine(todo: Sequence[tuple[str, Check]], config: Config) -> Iterator[Finding]:
    """Make all checks; one that breaks is a finding, and the others go on."""
    for name, check in todo:
        try:
            yield from check(config)
        except Exception as error:  # whatever is wrong with this machine, the rest of the report is wanted
            text = f"the check broke: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
            yield Finding(name.replace("_", "-"), "fail", text, "repair that, or report it")


def line(finding: Finding) -> str:
    """A finding for a person, on one line."""
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    return " ".join(f"{finding.status:5}{finding.name:14}{finding.text}{remedy}".splitlines())


def main(argv: list[str]) -> int:
    """Check, print, and return 1 if anything fails."""
    parser = Parser(
        prog="python -m launch doctor",
        usage="%(prog)s [OPTIONS] [-- TRAIN ARGUMENTS]",
        description=__doc__.split("\n")[0],
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--slurm", action="store_true", help="check the Slurm cluster too: starts a probe of seconds on its nodes"
    )
    parser.add_argument("--nodes", type=int, default=2, help="nodes that the probe runs on (default 2)")
    parser.add_argument("--partition", help="partition of the probe (default: the cluster's)")
    parser.add_argument("--account", help="account of the probe (default: yours)")
    own, arguments = split_arguments(argv)
    options, wrong = parser.parse_known_args(own)
    if wrong:
        raise UserError(f"launch doctor has no option {wrong[0]}. The training's arguments stand behind `--`.")
    if options.nodes < 1:
        raise UserError(f"--nodes is {options.nodes}. Use 1 or more.")
    config = parse(arguments)
    todo: list[tuple[str, Check]] = [(check.__name__, check) for check in checks.CHECKS]
    if options.slurm:
        where = [f"--{name}={value}" for name in ("partition", "account") if (value := getattr(options, name))]
        todo = [*todo[:-1], ("slurm", functools.partial(cluster.slurm, nodes=options.nodes, where=where))]
    found = []
    for finding in examine(todo, config):
        found.append(finding)
        if not options.json:
            print(line(finding), flush=True)
    fails, warns = (sum(finding.status == status for finding in found) for status in ("fail", "warn"))
    if options.json:
        status = "fail" if fails else "warn" if warns else "OK"
        print(json.dumps({"status": status, "findings": [dataclasses.asdict(finding) for finding in found]}, indent=1))
    else:
        print(f"{len(found)} checks: {fails} fail, {warns} warn")
    return 1 if fails else 0

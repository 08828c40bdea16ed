"""`python -m launch bench WHAT`: measure, and print a table with the command, the hardware and the versions."""

import argparse
import dataclasses
import json
import platform
import shlex
import statistics
from collections.abc import Callable
from typing import Any

from launch.bench import measures, peers
from launch.bench.measures import Row, count_cores, cpu_name, number
from train.cli import Parser
from train.errors import FINISHED, UserError

MEASURES: dict[str, tuple[Callable[..., list[Row]], int, str]] = {  # name: (function, default repeats, help)
    "throughput": (measures.throughput, 100, "our loop and a bare PyTorch loop of the same model, in one process"),
    "peers": (peers.peers, 5, "the same model in the idioms of other trainers (pip install 'lockstep[bench]')"),
    "exact": (measures.exact, 5, "exact against fast mode, on 1 and 2 processes (on 1 if there is one GPU)"),
    "micro-batches": (measures.micro_batches, 5, "BatchNorm over 1, 2 and 8 micro-batches of a batch, on 1 process"),
    "scaling": (measures.scaling, 3, "1 to N processes: strong (one global batch) and weak (one share per process)"),
    "startup": (measures.startup, 5, "the whole command: help, an error, a training of one step"),
    "time-to-accuracy": (
        measures.time_to_accuracy,
        10,
        "a recipe's accuracy and seconds, over as many seeds as repeats",
    ),
}


def facts(argv: list[str], repeats: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    import torch

    from train.world.environment import git_commit, versions

    return {
        "command": shlex.join(["python", "-m", "launch", "bench", *argv]),
        "cpu": cpu_name(),
        "cores": count_cores(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": {"python": platform.python_version(), **versions("torch", "accelerate", "lightning", "lockstep")},
        "commit": git_commit() or "unknown",
        "n": repeats,
    }


def ratios(row: Row, rows: list[Row]) -> list[float]:
    """Divide a row's values by those of its base, turn by turn."""
    base = next(other for other in rows if other.name == row.base)
    return [value / reference for value, reference in zip(row.values, base.values, strict=True)]


def table(rows: list[Row], about: dict[str, Any]) -> str:
    """Return the figures as a Markdown table. A ratio is taken within a turn before its median."""
    hardware = ", ".join([f"{about['cpu']}, {about['cores']} cores", *about["gpus"]])
    versions = ", ".join(f"{name} {text}" for name, text in about["versions"].items())
    lines = [
        f"`{about['command']}`; {hardware}; {versions}; commit {about['commit']}; n = {about['n']}",
        "",
        "| what | unit | median | min | max | mean ± sd | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        deviation = f" ± {number(statistics.stdev(row.values))}" if len(row.values) > 1 else ""
        ratio = f"{statistics.median(ratios(row, rows)):.3f} of {row.base}" if row.base else ""
        shown = [number(found(row.values)) for found in (statistics.median, min, max, statistics.fmean)]
        lines.append(f"| {row.name} | {row.unit} | {' | '.join(shown)}{deviation} | {ratio} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure and print; return the exit code."""
    listed = "\n".join(f"  {name:17} {text}" for name, (_, _, text) in MEASURES.items())
    parser = Parser(
        prog="python -m launch bench",
        description=f"Measure one of:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe = "config of time-to-accuracy (default %(default)s)"
    parser.add_argument("what", choices=MEASURES, metavar="WHAT", help="what to measure, see above")
    parser.add_argument("--repeats", type=int, help="turns (or seeds); default depends on WHAT")
    parser.add_argument("--recipe", default="configs/quickstart.yaml", help=recipe)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    measure, default, _ = MEASURES[options.what]
    repeats = default if options.repeats is None else options.repeats
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}. Use 1 or more.")
    rows = measure(repeats, *([options.recipe] if options.what == "time-to-accuracy" else []))
    about = facts(argv, repeats)
    shown = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
    print(json.dumps(shown, indent=1) if options.json else table(rows, about))
    return FINISHED

"""`python -m launch bench WHAT`: measure, and print a table with the command, the hardware and the versions.

Every figure is a list of repeats. What is compared is measured in turns, so that a noisy machine disturbs all alike,
and a ratio is taken within a turn before its median.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.cli import Parser
from train.errors import FINISHED, UserError

MEASURES = {  # name: (module, default repeats, what it measures)
    "throughput": ("measures", 100, "our loop and a bare PyTorch loop of the same model, data in memory, one process"),
    "data": ("measures", 15, "augmentations of a batch, and the evaluation of the test split"),
    "sampler": ("measures", 15, "cost of a step's indices against the size of the data set"),
    "checkpoint": ("measures", 15, "encode, write, read and verify a checkpoint"),
    "peers": ("peers", 5, "the same model in the idioms of other trainers (pip install 'lockstep[bench]')"),
    "exact": ("measures", 5, "exact against fast mode, on 1 and 2 processes (on 1 if there is one GPU)"),
    "scaling": ("measures", 3, "1 to N processes: strong (one global batch) and weak (one share per process)"),
    "wandb": ("measures", 5, "cost of logging to W&B, offline, at log.every_steps 10"),
    "startup": ("measures", 5, "the whole command: help, an error, a training of one step"),
    "time-to-accuracy": ("measures", 10, "a recipe's accuracy and seconds, over as many seeds as repeats"),
}


@dataclass(frozen=True)
class Row:
    """One thing that was measured: a value per turn. `base` names the row that it is compared with."""

    name: str
    unit: str
    values: list[float]
    base: str | None = None


def in_turns(works: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure each work once per turn and return its figures.

    Each figure is printed to stderr as soon as it is there.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(1, repeats + 1):
        for name, work in works.items():
            found[name].append(work())
            print(f"turn {turn} of {repeats}: {name}: {number(found[name][-1])}", file=sys.stderr, flush=True)
    return found


def compared(found: Mapping[str, list[float]], unit: str, base: str) -> list[Row]:
    """Return a row for each name, all compared with the row `base`."""
    return [Row(name, unit, values, None if name == base else base) for name, values in found.items()]


def cpu_name() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def gpu_names() -> list[str]:
    """Return each GPU's name and power limit, as nvidia-smi prints them."""
    command = ("nvidia-smi", "--query-gpu=name,power.limit", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()


def facts(argv: list[str], repeats: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    from train.world.environment import git_commit, versions

    found = {"python": platform.python_version(), **versions("torch", "accelerate", "lightning", "lockstep")}
    command = shlex.join(["python", "-m", "launch", "bench", *argv])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_name(), "cores": cores, "gpus": gpu_names(), "n": repeats, "versions": found, "commit": git_commit(),
        "command": command,
    }  # fmt: skip


def ratios(row: Row, rows: list[Row]) -> list[float]:
    """Divide a row's values by those of its base, turn by turn."""
    base = next(other for other in rows if other.name == row.base)
    return [value / reference for value, reference in zip(row.values, base.values, strict=True)]


def number(value: float) -> str:
    """Write a figure with four significant digits, or all of its whole part."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: list[Row], about: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    versions = ", ".join(f"{name} {text}" for name, text in about["versions"].items())
    hardware = ", ".join([f"{about['cpu']}, {about['cores']} cores", *about["gpus"]])
    commit = about["commit"] or "no commit"
    short = commit[:12] + ("+" if commit.endswith("+") else "")
    lines = [
        f"`{about['command']}`; {hardware}; {versions}; commit {short}; n = {about['n']}",
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


def plot(rows: list[Row], about: dict[str, Any], output: Path) -> None:
    """Draw the medians with their ranges as bars, SVG or PNG by the name of `output`, one panel per unit."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(row.unit for row in rows))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lockstep"}):
        figure = Figure(figsize=(9, 0.9 + 0.45 * len(rows) + 0.5 * len(units)), layout="constrained")
        heights = [sum(row.unit == unit for row in rows) + 0.8 for unit in units]
        panels = figure.subplots(len(units), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, unit in zip(panels, units, strict=True):
            shown = {row.name: row.values for row in rows if row.unit == unit}
            middles = [statistics.median(values) for values in shown.values()]
            below = [middle - min(values) for middle, values in zip(middles, shown.values(), strict=True)]
            above = [max(values) - middle for middle, values in zip(middles, shown.values(), strict=True)]
            bars = panel.barh(list(shown), middles, xerr=[below, above], color="#4d6c8f", ecolor="#22272e")
            panel.bar_label(bars, [number(middle) for middle in middles], padding=8)
            panel.invert_yaxis()
            panel.set_xlabel(unit)
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0.12)
        figure.suptitle(f"{about['command']}, n = {about['n']}, {about['cpu']}, {about['cores']} cores", fontsize=9)
        figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def make_parser() -> Parser:
    """Build the command line."""
    listed = "\n".join(f"  {name:17} {text}" for name, (_, _, text) in MEASURES.items())
    parser = Parser(
        prog="python -m launch bench",
        description=f"Measure one of:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=MEASURES, metavar="WHAT", help="what to measure, see above")
    parser.add_argument("--repeats", type=int, help="turns (or seeds); default depends on WHAT")
    recipe = "config of time-to-accuracy (default %(default)s)"
    parser.add_argument("--recipe", default="configs/quickstart.yaml", help=recipe)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures too, .svg or .png")
    return parser


def main(argv: list[str]) -> int:
    """Measure and print; return the exit code."""
    options = make_parser().parse_args(argv)
    module, repeats, _ = MEASURES[options.what]
    repeats = options.repeats if options.repeats is not None else repeats
    has_recipe = options.what == "time-to-accuracy"
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}. Use 1 or more.")
    if has_recipe and not Path(options.recipe).is_file():
        raise UserError(f"--recipe {options.recipe} is no file. Give a config, such as configs/quickstart.yaml.")
    if options.plot and options.plot.suffix not in (".svg", ".png"):
        raise UserError(f"--plot is {options.plot}. Expected a name that ends in .svg or .png.")
    measure = getattr(importlib.import_module(f"launch.bench.{module}"), options.what.replace("-", "_"))
    rows: list[Row] = measure(repeats, *([options.recipe] if has_recipe else []))
    about = facts(argv, repeats)
    if options.plot:
        plot(rows, about, options.plot)
    shown = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
    print(json.dumps(shown, indent=1) if options.json else table(rows, about))
    return FINISHED

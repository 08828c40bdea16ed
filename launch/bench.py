"""`python -m launch bench exact`: what exact mode costs, measured by training; a table, or JSON.

The same global batch is trained on in fast mode (one micro-batch per rank) and in exact mode with M micro-batches, one thread
per process, the cells interleaved so that a noisy machine disturbs all of them alike. The first steps of a run do not count.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch.run import Ranks
from train.config import UserError

STEPS, WARM_UP_STEPS, GLOBAL_BATCH_SIZE = 60, 20, 512
RECIPE = (
    f"--data.name random --data.random_examples {GLOBAL_BATCH_SIZE * 20} --model.name cnn --train.precision bf16 "
    f"--train.global_batch_size {GLOBAL_BATCH_SIZE} --train.max_steps {STEPS} --train.num_threads 1 --log.every_steps 10 "
    f"--eval.every_steps {STEPS} --checkpoint.every_steps {STEPS} --log.progress false --log.report false --wandb.mode disabled"
)


def images_per_second(directory: Path, name: str, world_size: int, micro_batches: int) -> float:
    """Train one run (micro_batches 0: fast mode) and return its speed after the warm-up."""
    mode = ["--train.exact", "true", "--train.micro_batches", str(micro_batches)] if micro_batches else []
    arguments = [*RECIPE.split(), *mode, "--run.dir", str(directory), "--run.name", name]
    if Ranks(world_size, arguments, 0, quiet=True).wait():
        raise RuntimeError(f"The run {name} failed. See what `python -m train {' '.join(arguments)}` says.")
    rows = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    seconds = {row["step"]: row["train_seconds"] for row in rows if row["event"] == "train"}
    return GLOBAL_BATCH_SIZE * (STEPS - WARM_UP_STEPS) / (seconds[STEPS] - seconds[WARM_UP_STEPS])


def measure(repeats: int) -> list[dict[str, Any]]:
    """Measure every cell `repeats` times, interleaved -> one row per cell with median, min and max images/s."""
    cells = [(world_size, parts) for world_size in (1, 2) for parts in (0, 1, 2, 4, 8) if parts >= world_size or not parts]
    speeds: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
    with tempfile.TemporaryDirectory() as place:
        for repeat in range(repeats):
            for cell in cells:
                speeds[cell].append(images_per_second(Path(place), f"w{cell[0]}-m{cell[1]}-{repeat}", *cell))
    rows = []
    for (world_size, parts), found in speeds.items():
        # A ratio is taken within a repeat, where the machine was the same, and then its median.
        ratios = [fast / exact for fast, exact in zip(speeds[world_size, 0], found, strict=True)]
        spread = {"median": statistics.median(found), "min": min(found), "max": max(found)}
        slower = statistics.median(ratios) - 1
        rows.append({"world_size": world_size, "micro_batches": parts, "images_per_second": spread, "slower": slower})
    return rows


def facts(repeats: int) -> dict[str, Any]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {name: version(name) for name in ("torch", "accelerate", "lockstep")}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": 1, "n": repeats, "versions": versions}


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The figures as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread per process, {versions}, n = {about['n']}; "
        f"cnn, bf16, {GLOBAL_BATCH_SIZE} examples per step, {STEPS - WARM_UP_STEPS} steps; `python -m launch bench exact`",
        "",
        "| world size | mode | images/s: median (min to max) | slower than fast mode |",
        "|---|---|---|---|",
    ]
    for row in rows:
        parts, speed = row["micro_batches"], row["images_per_second"]
        mode = f"exact, {parts} x {GLOBAL_BATCH_SIZE // parts}" if parts else "fast"
        figures = f"{speed['median']:,.0f} ({speed['min']:,.0f} to {speed['max']:,.0f})"
        slower = f"{row['slower']:+.1%}" if parts else "-"
        lines.append(f"| {row['world_size']} | {mode} | {figures} | {slower} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m launch bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["exact"], help="exact: exact against fast mode")
    parser.add_argument("--repeats", type=int, default=5, help="runs per cell (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}. Use 1 or more.")
    rows, about = measure(options.repeats), facts(options.repeats)
    print(json.dumps({"about": about, "rows": rows}, indent=1) if options.json else table(rows, about))
    return 0

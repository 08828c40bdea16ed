"""Check a GPU in nine minutes and write one receipt: `tests/gpu/check.sh [--device cpu] [--output DIR] [STAGE ...]`.

Stages: correct (does every mode run, with the right bits), speed (alone on the card), ranks (several ranks over NCCL).
--device cpu is the dry run, so that these checks do not rot where there is no GPU.
Exit codes: 0 if no row failed, 1 if one did.
"""

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from gpu.plan import STAGES, Machine, module, unit, waves
from gpu.visit import Job, Visit, table
from launch.bench.measures import cpu_name

ROOT = Path(__file__).parents[2]
PACKED = ROOT / ".gpu"  # what pack.sh made
PACKAGES = ("pytest", "hypothesis", "onnx", "onnxscript", "onnxruntime", "wandb", "lightning")
GB_PER_JOB = 2.0  # of GPU memory: up to four ranks, mostly CUDA's own
QUERY = "name,driver_version,power.limit,memory.total,clocks.max.sm"


def cards() -> list[dict[str, str]]:
    """Return what nvidia-smi prints of each GPU; return nothing without a GPU."""
    command = ("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(QUERY.split(","), line.split(", "), strict=False)) for line in printed.strip().splitlines()]


def commit() -> str | None:
    """Return the commit of the checkout, or without git the one that pack.sh recorded."""
    command = ("git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        packed = PACKED / "commit"
        return f"{packed.read_text().strip()} when packed" if packed.exists() else None


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the outcome depends on, as far as it can be found without torch."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": options.device,
        "stages": options.stages,
        "cards": cards() if options.device == "cuda" else [],
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": commit(),
        "versions": {"python": platform.python_version()},
    }


def examine(visit: Visit, options: argparse.Namespace) -> Machine:
    """Find what this machine has, by torch, and look for MNIST; both are rows of the visit."""
    machine = Machine(options.device, visit.work)
    mnist = Job("mnist", 60, module("launch", "data", "--name", "mnist"))
    if machine.is_dry:
        mnist.why_not = "not in the dry run: it trains on digits"
    facts, data = planned = visit.plan("facts", [unit("facts", 90, machine, "facts", *PACKAGES), mnist])
    visit.run(planned, at_once=2)
    found = next((check for check in facts[1].checks if check["check"] == "facts"), {})
    visit.receipt["versions"] |= found.get("versions", {})
    machine.num_gpus, machine.memory_gb = found.get("num_gpus", 0), found.get("memory_gb", 0.0)
    visit.receipt["gpus"] = found.get("gpus", [])
    machine.missing = found.get("missing", [])
    machine.nccl = tuple(map(int, found.get("versions", {}).get("nccl", "0").split(".")))
    machine.has_mnist = data[1].outcome == "ok"
    if (PACKED / "libnccl.so.2.xz").exists() and machine.num_gpus == 1:
        machine.nccl_library = os.environ.get("GPU_CHECK_NCCL", "")
    return machine


def interrupt(number: int, frame: FrameType | None) -> None:
    """Leave as after Ctrl-C: the commands are killed and the receipt is written."""
    raise KeyboardInterrupt


def visit_all(visit: Visit, options: argparse.Namespace) -> None:
    """Run every stage that was asked for."""
    machine = examine(visit, options)
    if visit.failed:
        return
    most = max(1, min(visit.receipt["cores"] - 2, int(machine.memory_gb / GB_PER_JOB)))
    at_once = {"correct": most, "speed": 1, "ranks": 2}
    planned = [(stage, visit.plan(stage, jobs)) for stage, jobs in waves(machine, options.stages)]
    for stage, jobs in planned:
        visit.run(jobs, at_once=1 if machine.is_dry else at_once[stage])
        visit.pack_logs()


def main(argv: list[str]) -> int:
    """Visit, print the table and return the exit code."""
    parser = argparse.ArgumentParser(prog="tests/gpu/check.sh", description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, smaller")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu-check"))
    parser.add_argument("--seconds", type=float, default=540, help="the visit ends after so long (default %(default)s)")
    options = parser.parse_args(argv)
    options.stages = options.stages or [*STAGES]
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}. Use {', '.join(STAGES)}.")
    signal.signal(signal.SIGTERM, interrupt)
    work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    os.environ |= {"XDG_CACHE_HOME": str(work / "cache"), "TMPDIR": str(work)}
    visit, outcome = Visit(options.output.absolute(), work, options.seconds, about(options)), "interrupted"
    try:
        visit_all(visit, options)
        outcome = "failed" if visit.failed else "finished"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        visit.write(outcome)
        visit.pack_logs()
        shutil.rmtree(work, ignore_errors=True)
    print(table(visit.receipt), f"{outcome}: {visit.output / 'receipt.json'}", sep="\n", flush=True)
    return 0 if outcome == "finished" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

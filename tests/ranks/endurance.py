"""Measure whether memory, descriptors, threads, step time and disk stay constant during a long run."""

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from ranks.processes import Ranks, arguments, rows

FLAGS = (
    "--model.name tiny_bn --train.num_micro_batches 2 --model.dropout 0.2 --augment.shift 2 --optim.ema 0.9 "
    "--log.every_steps 20 --checkpoint.every_steps 500 --eval.every_steps 500"
)


def measure(pid: int, run: Path) -> dict[str, float]:
    """Return the resident memory, descriptors and threads of a process, and the size of its run."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    files = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    return {
        "resident_mib": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(status["Threads"]),
        "disk_mib": sum(files) / 2**20,
        "log_mib": (run / "metrics.jsonl").stat().st_size / 2**20,
    }


def campaign(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Make many steps and measure slopes per 10,000 steps, over all but the first tenth."""
    run = place / "long"
    ranks = Ranks(2, arguments(run, FLAGS, f"--train.max_steps {options.steps}"), place / "logs")
    samples: dict[int, list[dict[str, float]]] = defaultdict(list)
    while all(process.is_alive() for process in ranks.processes):
        time.sleep(options.every)
        with suppress(OSError, LookupError, ValueError):
            step = rows(run, "train")[-1]["step"]
            for rank, process in enumerate(ranks.processes):
                assert process.pid
                samples[rank].append({"step": step, **measure(process.pid, run)})
    codes = ranks.wait()
    seconds = [(row["step"], row["train_seconds"]) for row in rows(run, "train")]
    pace = [(step, 1e3 * (now - before) / (step - last)) for (last, before), (step, now) in itertools.pairwise(seconds)]

    def slope(points: list[tuple[float, float]]) -> dict[str, float]:
        late = [point for point in points if point[0] > options.steps / 10]
        line = statistics.linear_regression(*zip(*late, strict=True))
        return {"first": late[0][1], "last": late[-1][1], "per_10000_steps": line.slope * 10_000}

    slopes = {"step_ms": slope(pace)}
    for rank, found in samples.items():
        slopes |= {
            f"rank {rank} {name}": slope([(s["step"], s[name]) for s in found]) for name in found[0] if name != "step"
        }
    return {"steps": seconds[-1][0], "codes": codes, "slopes": slopes}


def table(result: dict[str, Any]) -> str:
    """Return one line per quantity."""
    lines = [
        f"{result['steps']:,} steps on 2 ranks, exit codes {result['codes']}",
        "",
        "| what | first | last | per 10,000 steps |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {s['first']:.2f} | {s['last']:.2f} | {s['per_10000_steps']:+.4f} |"
        for name, s in result["slopes"].items()
    ]
    return "\n".join(lines)

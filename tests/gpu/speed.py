"""Measure the microseconds per step: in total, of the host and of the GPU's kernels.

Usage: `python -m gpu.speed [--device cpu]`. Nothing else may run on the GPU. On a CPU it makes a few steps of two cases
to show that it works.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu.inside import FAST, FAST_995, Check, Lab, options, report
from launch.bench.measures import bare_step

STEPS, TURNS, WARM_UP, TRACED, LONGEST = 400, 3, 12, 4, 6
EXAMPLES = 1 << 16  # a multiple of every batch: no short one, which has no graph
CNN = "--model.name cnn --train.precision bf16"


def kernels(lab: Lab, step: Callable[[], object]) -> dict[str, Any]:
    """Return per step: kernels, microseconds in them, and the longest as [us, calls, name]."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(TRACED):
            step()
        lab.wait()
    found = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names: dict[str, list[float]] = {}
    for event in found:
        names.setdefault(event.name[:60], []).append(event.time_range.elapsed_us())
    longest = sorted(((sum(us) / TRACED, len(us) / TRACED, name) for name, us in names.items()), reverse=True)[:LONGEST]
    busy = sum(event.time_range.elapsed_us() for event in found) / TRACED
    top = [[round(us, 1), calls, name] for us, calls, name in longest]
    return {"kernels": len(found) / TRACED, "busy_us": round(busy, 1), "top": top}


def timed(lab: Lab, step: Callable[[], object]) -> dict[str, Any]:
    """Return the best turn's microseconds per step, and the host's share of them before it waits."""
    steps, warm_up = (STEPS, WARM_UP) if lab.on_gpu else (3, 1)
    for _ in range(warm_up):
        step()
    whole, host = [], []
    for _ in range(TURNS if lab.on_gpu else 1):
        lab.wait()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        host.append(time.perf_counter() - began)
        lab.wait()
        whole.append(time.perf_counter() - began)
    found = {"us": round(1e6 * min(whole) / steps, 1), "host_us": round(1e6 * min(host) / steps, 1)}
    return found | (kernels(lab, step) if lab.on_gpu else {})


def speed(lab: Lab, flags: str, *, is_bare: bool = False) -> dict[str, Any]:
    """Time a step of the program, or of the bare loop."""
    began = time.perf_counter()
    with lab.open(f"--data.random_examples {EXAMPLES if lab.on_gpu else 2000} {flags}") as (plan, _, own_step):
        step = bare_step(plan.config, plan.data) if is_bare else own_step
        step()
        lab.wait()
        first = round(time.perf_counter() - began, 2)
        return {"ok": None, "until_first_step_s": first, **timed(lab, step)}


def cases(lab: Lab) -> list[Check]:
    """Return what is timed, the most important first."""
    on, off = "--train.cuda_graphs on", "--train.cuda_graphs off"
    if not lab.on_gpu:
        return [("bare", partial(speed, lab, CNN, is_bare=True)), ("fast ordinary", partial(speed, lab, FAST))]
    found: list[Check] = []
    for batch in (128, 256):
        flags = f"{CNN} {on} --train.global_batch_size {batch}"
        found += [(f"bare graph {batch}", partial(speed, lab, flags, is_bare=True))]
        found += [(f"cnn graph {batch}", partial(speed, lab, flags))]
    exact = f"{FAST} {on} --train.exact true --train.num_micro_batches"
    named = {
        "fast ordinary": f"{FAST} {off}",
        "fast graph": f"{FAST} {on}",
        "fast-99.5 graph": f"{FAST_995} {on}",
        "fast-99.5 graph 1 x 128": f"{FAST_995} {on} --train.num_micro_batches 1",
        "fast graph nchw": f"{FAST} {on} --train.channels_last false",
        **{f"fast graph exact {parts}": f"{exact} {parts}" for parts in (1, 4, 8)},
        **{f"fast graph {batch}": f"{FAST} {on} --train.global_batch_size {batch}" for batch in (1024, 8192)},
        "fast graph compile": f"{FAST} {on} --train.compile true",
    }
    return [*found, *((name, partial(speed, lab, flags)) for name, flags in named.items())]


def main(argv: list[str]) -> int:
    """Time all cases."""
    return report(cases(Lab(options(argv).device)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

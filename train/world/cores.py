"""The cores that this process may use, and how its threads share them with others.

Invariant: the number of threads depends on what this process was given, not on what others do at the moment: in most
modes it decides the bits. Others on the same cores cost a run its share, but not several times that
(docs/benchmarks.md, "Two runs on the same cores").
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from train.config import TrainConfig
from train.world.launcher import Placement, is_slurm_task

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
WAIT_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = "2000"  # enough for the gaps within a step: sleeping at once costs a run that is alone a quarter of its speed


def limit_spinning() -> None:
    """Let OpenMP's threads sleep soon when they wait. Call it before torch is imported; a user's choice stays.

    By default they spin for milliseconds, also when another process could use their core.
    """
    if not any(name in os.environ for name in WAIT_POLICIES):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _quotas() -> Iterator[float]:
    """Yield the cores that this process's control groups, version 1 or 2, and those above them are limited to."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root, files = CGROUPS, ["cpu.max"]
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            root, files = CGROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        group = root / path.lstrip("/")
        for place in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            try:
                quota, period = " ".join((place / file).read_text() for file in files).split()
            except (OSError, ValueError):  # of the host, which a container does not see
                continue
            if quota.isdecimal():  # not `max`, nor -1
                yield int(quota) / int(period)


def own_cores() -> list[int]:
    """Return the numbers of the cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def count_cores() -> int:
    """Return how many cores this process may use: those it may run on, or its CPU quota, rounded up."""
    return max(1, min([len(own_cores()), *map(math.ceil, _quotas())]))


def why_slow(num_threads: int, num_processes: int) -> str:
    """Return in a line why so many processes of so many threads are slow on this machine now, or "".

    Takes a tenth of a second, in which this process sleeps and measures how busy others keep its cores. Where the
    system hides that, the answer is "".
    """
    import psutil

    cores = count_cores()
    if num_threads * num_processes > cores:
        return f"{num_processes} process(es) of {num_threads} thread(s) share {cores} core(s)"
    try:
        percents = psutil.cpu_percent(0.1, percpu=True)
    except (OSError, NotImplementedError, psutil.Error):
        return ""  # some containers hide /proc/stat: how busy the cores are is unknown
    busy = sum(percents[core] for core in own_cores() if core < len(percents)) / 100
    if num_threads * num_processes + busy > len(own_cores()) + 0.5:
        advice = ". Threads wait for each other: try --train.num_threads 1" if num_threads > 1 else ""
        return f"other processes keep {busy:.1f} of {len(own_cores())} core(s) busy{advice}"
    return ""


def choose_num_threads(config: TrainConfig, place: Placement) -> int:
    """Return the CPU threads of this process. By default: an equal share of the cores, or 1 in exact mode.

    Slurm may bind each task to its own `--cpus-per-task`. OMP_NUM_THREADS is an upper limit, unless it is the 1 that
    torchrun and accelerate set for several ranks.
    """
    cores = count_cores()
    share = max(1, cores // place.local_world_size)
    if is_slurm_task(os.environ, place.local_rank, place.local_world_size):
        share = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK") or share))
    limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if limit.isdecimal() and int(limit) and not (limit == "1" and place.local_world_size > 1):
        share = min(share, int(limit))
    return config.num_threads or (1 if config.exact else share)

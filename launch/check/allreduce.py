"""`python -m launch.check.allreduce`: one of several processes that add tensors up; prints JSON.

`launch doctor` starts some on its machine, and under `srun` one on each node of a cluster. The numbers are integers
whose sums float32 holds exactly: a right all-reduce gives the expected bits in any order of addition.
"""

import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.run import Command, Ranks
from train.cli import Parser
from train.config import TrainConfig
from train.errors import BAD_INPUT, CRASHED, FINISHED, RunError, UserError, one_line
from train.world.environment import versions
from train.world.launcher import rank_variables, read_placement
from train.world.process import leave

VALUES = 1000  # distinct numbers: below 2**24 even when 4,096 ranks have added theirs


def measure(sizes: list[int], repeats: int, timeout: timedelta, *, on_cpu: bool) -> dict[str, Any]:
    """All-reduce tensors of each of `sizes` bytes; check and time them. Collective: every rank must call it."""
    import torch
    import torch.distributed as dist

    from train.world.device import choose_backend, choose_device
    from train.world.world import join

    os.environ.update(rank_variables(os.environ))
    place = read_placement()
    rank, world_size = place.rank, place.world_size
    torch.set_num_threads(1)
    device = choose_device(TrainConfig(device="cpu" if on_cpu else "auto"), place.local_rank, place.local_world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        join(device, place, timeout)
    else:
        dist.init_process_group(choose_backend(device), store=dist.HashStore(), rank=0, world_size=1)
    num_wrong, seconds = 0, {}
    for size in sizes:
        numbers = torch.arange(size // 4, device=device).remainder(VALUES).to(torch.float32)
        times = []
        for _ in range(repeats + 1):  # the first one connects
            values = numbers + rank
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        seconds[str(size)] = statistics.median(times[1:])
        num_wrong += int((values != numbers * world_size + world_size * (world_size - 1) // 2).sum())
    backend = dist.get_backend()
    dist.destroy_process_group()
    return {"rank": rank, "world_size": world_size, "backend": backend, "wrong": num_wrong, "seconds": seconds}


def introduce(shared: Path) -> dict[str, Any]:
    """Leave a file with this node's name in a directory; return the name, why that failed, and versions."""
    host, problem = os.environ.get("SLURMD_NODENAME", socket.gethostname()), ""
    try:
        (shared / host).touch()
    except OSError as error:
        problem = error.strerror or str(error)
    packages = [f"{name} {version}" for name, version in versions("torch", "numpy", "lockstep").items()]
    return {"host": host, "problem": problem, "versions": [f"python {platform.python_version()}", *packages]}


def run_local(program: Command, nproc: int, arguments: list[str], seconds: float) -> list[dict[str, Any]]:
    """Start processes on this machine and return what each printed. Raise RunError if one fails, or TimeoutError."""
    with tempfile.TemporaryFile("a+") as output:  # a pipe would fill up; appended lines stay whole
        try:
            code = Ranks(nproc, arguments, output=output, program=program).wait(seconds)
        finally:
            output.seek(0)
            lines = output.read().splitlines()
            if os.environ.get("NCCL_DEBUG"):
                print("\n".join(lines), file=sys.stderr)
    if code:
        said = [line for line in lines if line.startswith("error: ")][:1] or lines[-2:]
        raise RunError(f"{nproc} processes failed: {'; '.join(said)[:250]}")
    return [json.loads(line) for line in lines if line.startswith("{")]


def main(argv: list[str]) -> int:
    """Measure as one rank, and print what was found; `wrong` counts the wrong sums."""
    parser = Parser(prog="python -m launch.check.allreduce", description=__doc__)
    parser.add_argument("--bytes", type=int, nargs="+", default=[4, 1 << 20, 25 << 20], help="sizes of the tensors")
    parser.add_argument("--repeats", type=int, default=10, help="all-reduces of each size (default 10)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds until a lost rank is an error (default 60)")
    parser.add_argument("--cpu", action="store_true", help="gloo on the CPU even where there are GPUs")
    parser.add_argument("--shared", type=Path, help="leave a file in this directory, and print host and versions first")
    options = parser.parse_args(argv)
    if options.shared:
        print(json.dumps(introduce(options.shared)), flush=True)
    try:
        found = measure(options.bytes, options.repeats, timedelta(seconds=options.timeout), on_cpu=options.cpu)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT if isinstance(error, UserError) else CRASHED
    except Exception as error:  # the process group stays: destroying it would wait for ranks that may never join
        print(f"error: {type(error).__name__}: {one_line(error)}", file=sys.stderr, flush=True)
        return CRASHED
    print(f"{json.dumps(found)}\n", end="", flush=True)  # in one write: the ranks share their output
    return FINISHED


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

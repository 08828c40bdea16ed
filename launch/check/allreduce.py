"""`python -m launch.check.allreduce`: one of N processes that add tensors up; each prints what it found as one line of JSON.

`launch doctor` starts some on its machine; under `srun` it measures a cluster (docs/scaling.md). The numbers are integers
whose sums float32 holds exactly, so a right all-reduce gives the expected bits in any order of addition.
"""

import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from launch.run import ON_LOOPBACK, die_with_parent
from train.cli import Parser
from train.config import TrainConfig
from train.errors import UserError
from train.world.device import choose_backend, choose_device
from train.world.launcher import slurm_variables
from train.world.process import leave

VALUES = 1000  # distinct numbers: below 2**24 even when 4,096 ranks have added theirs
POLL_SECONDS = 0.05
AFTER_A_FAILURE_SECONDS = 2.0  # for the other processes to say what they saw


def measure(sizes: list[int], repeats: int, timeout: float, *, on_cpu: bool) -> dict[str, Any]:
    """Join the group, all-reduce tensors of each of `sizes` bytes, check and time them. Collective: every rank must call it."""
    import torch
    import torch.distributed as dist

    os.environ.update(slurm_variables(os.environ))
    place = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    rank, world_size, local_rank, local_world_size = place
    torch.set_num_threads(1)
    device = choose_device(TrainConfig(device="cpu" if on_cpu else "auto"), local_rank, local_world_size)
    backend, on_gpu = choose_backend(device), device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    wrong, seconds = 0, {}
    try:
        for size in sizes:
            numbers = torch.arange(size // 4, device=device).remainder(VALUES).to(torch.float32)
            times = []
            for _ in range(repeats + 1):  # the first one connects
                values = numbers + rank
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(values)
                if on_gpu:
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - began)
            seconds[str(size)] = statistics.median(times[1:])
            wrong += int((values != numbers * world_size + world_size * (world_size - 1) // 2).sum())
    except Exception:  # destroy_process_group would wait for collectives that the other ranks may never join
        traceback.print_exc()
        leave(1)
    dist.destroy_process_group()
    return {"rank": rank, "world_size": world_size, "backend": backend, "wrong": wrong, "seconds": seconds}


def free_port() -> int:
    """A port on the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_local(program: tuple[str, ...], nproc: int, arguments: list[str], timeout: float) -> list[dict[str, Any]]:
    """Start `nproc` processes on this machine and return what each printed; raise RuntimeError if one fails or hangs."""
    env = ON_LOOPBACK | dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    env |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    # files, since a pipe would fill up
    outputs, errors = ([tempfile.TemporaryFile("w+") for _ in range(nproc)] for _ in range(2))  # noqa: SIM115
    processes = [
        subprocess.Popen(
            (*program, *arguments),
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
            stdout=output,
            stderr=error,
        )
        for rank, (output, error) in enumerate(zip(outputs, errors, strict=True))
    ]
    deadline, hung = time.monotonic() + timeout, False
    try:
        while None in (codes := [process.poll() for process in processes]):
            if any(codes):
                deadline = min(deadline, time.monotonic() + AFTER_A_FAILURE_SECONDS)
            if hung := time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    printed = [(read_all(output), read_all(error)) for output, error in zip(outputs, errors, strict=True)]
    for rank, (code, (said, error)) in enumerate(zip(codes, printed, strict=True)):
        if os.environ.get("NCCL_DEBUG"):
            sys.stderr.write(said)  # where NCCL writes
        if code:
            last = (error.strip().splitlines() or [""])[-1]
            raise RuntimeError(f"process {rank} of {nproc} ended with exit code {code}: {last[:150]}")
    if hung:
        missing = [rank for rank, code in enumerate(codes) if code is None]
        raise RuntimeError(f"{len(missing)} of {nproc} processes did not end within {timeout:g} s")
    return [json.loads(said.splitlines()[-1]) for said, _ in printed]


def read_all(file: IO[str]) -> str:
    """Return what a process has written into a file, and close it."""
    with file:
        file.seek(0)
        return file.read()


def main(argv: list[str]) -> int:
    """Measure as one rank; `wrong` in what it prints counts the sums that were."""
    parser = Parser(prog="python -m launch.check.allreduce", description=__doc__.split("\n")[0])
    parser.add_argument("--bytes", type=int, nargs="+", default=[4, 1 << 20, 25 << 20], help="sizes of the tensors")
    parser.add_argument("--repeats", type=int, default=10, help="all-reduces of each size (default 10)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds until a lost rank is an error (default 60)")
    parser.add_argument("--cpu", action="store_true", help="gloo on the CPU even where there are GPUs")
    options = parser.parse_args(argv)
    try:
        found = measure(options.bytes, options.repeats, options.timeout, on_cpu=options.cpu)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

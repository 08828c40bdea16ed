"""`python -m launch run`: train on this machine, one process per GPU.

Unlike torchrun it passes exit codes on (75 stays 75), forwards signals without killing a rank,
leaves no orphan when it is killed itself, and restarts a run whose rank died. Not here: several machines (torchrun,
Slurm). torch is not imported, so the launcher starts at once and stays small.
"""

import functools
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO

from train.cli import Parser, parse, split_arguments
from train.errors import BAD_INPUT, CRASHED, FINISHED, PREEMPTED, RunError, UserError
from train.world import signals
from train.world.launcher import check_world_size, choose_name
from train.world.process import die_with_parent

LEAVE_SECONDS = 10.0  # for the other ranks, once one has died: gloo tells them within a second
SAVE_SECONDS = 60.0  # for the other ranks, once one has left with a saved checkpoint
POLL_SECONDS = 0.05
DEV = Path("/dev")
Command = tuple[str, ...]
TRAIN: Command = (sys.executable, str(Path(__file__).parents[1] / "train" / "__main__.py"))
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
# both would listen on the first interface that reaches other machines
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}


def nvidia_nodes() -> list[Path]:
    """Return the device nodes of NVIDIA's GPUs. A container may hold numbers 2 and 3 alone."""
    return sorted(DEV.glob("nvidia[0-9]*"))


def count_gpus() -> int:
    """Count the GPUs that a training on this machine would see, by asking torch in a process of its own."""
    if not nvidia_nodes() and not any((DEV / name).exists() for name in ("kfd", "dxg")):  # AMD's GPUs, or those of WSL
        return 0
    command = (sys.executable, "-c", "import torch; print(torch.cuda.device_count())")
    # in a session of its own: a signal to this process's group must not end it
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"torch cannot count the GPUs: {reason[:200]}. `python -m launch doctor` checks this machine.")
    return int(done.stdout)


class Ranks:
    """The processes of one attempt. Each prints to `output`, by default to this process's."""

    def __init__(
        self,
        nproc: int,
        arguments: list[str],
        restart: int = 0,
        output: IO[str] | None = None,
        program: Command = TRAIN,
    ) -> None:
        self.output = output
        self.processes: list[subprocess.Popen] = []
        tie = functools.partial(die_with_parent, os.getpid())
        env = {**ON_LOOPBACK, **os.environ, "LOCKSTEP_RESTART": str(restart)}
        env |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
        # Ranks inherit the mask and lift it once their handlers are installed, seconds later: no signal is lost before.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
        try:
            # Rank 0 serves the rendezvous on this socket: no other process can take its port, or reach it from another
            # machine.
            with socket.create_server(("127.0.0.1", 0)) as store:
                if nproc > 1:
                    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.getsockname()[1])}
                    env |= {**address, "LOCKSTEP_STORE_FD": str(store.fileno())}
                for rank in range(nproc):
                    process = subprocess.Popen(
                        (*program, *arguments),
                        env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        pass_fds=[store.fileno()] if nproc > 1 and rank == 0 else [],
                        preexec_fn=tie,
                        stdout=output,
                        stderr=output,
                    )
                    self.processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)

    def send(self, number: int) -> None:
        """Send a signal to every rank that is running."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, seconds: float = math.inf) -> int:
        """Wait for all ranks, and return the exit code of the attempt: 0, 2, 75, or 1 for every kind of crash.

        Once one rank has left with an error, the others get a while before they are killed. If none has left after
        `seconds`, kill all and raise TimeoutError.
        """
        deadline = time.monotonic() + seconds
        first: tuple[int, int] | None = None
        while True:
            codes = [process.poll() for process in self.processes]
            failed = [(rank, code) for rank, code in enumerate(codes) if code]
            if failed and first is None:
                first = failed[0]
                deadline = time.monotonic() + (SAVE_SECONDS if first[1] == PREEMPTED else LEAVE_SECONDS)
            if None not in codes:
                if BAD_INPUT in codes:  # it holds for all ranks, whatever became of the others
                    return BAD_INPUT
                return self._judge(*first) if first else FINISHED
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                if first is None:
                    for process in self.processes:
                        process.wait()
                    raise TimeoutError(f"{len(codes)} process(es) did not end within {seconds:g} s")
            time.sleep(POLL_SECONDS)

    def _judge(self, rank: int, code: int) -> int:
        """Return the exit code of an attempt whose first rank to leave with an error had this one; print a crash."""
        if code == PREEMPTED:  # it holds for all ranks; one that was killed since hung during its exit
            return code
        named = {number.value: number.name for number in signal.Signals}
        how = named.get(-code, f"signal {-code}") if code < 0 else f"exit code {code}"
        print(f"launch: rank {rank} ended by {how}", file=self.output or sys.stderr, flush=True)
        return CRASHED


def read_command_line(argv: list[str]) -> tuple[list[str], int, int, int]:
    """Return the training's arguments, with a run name for all restarts, --nproc, --min-nproc and --max-restarts."""
    usage = "%(prog)s [OPTIONS] -- TRAIN ARGUMENTS"
    parser = Parser(prog="python -m launch run", usage=usage, description=__doc__)
    parser.add_argument("--nproc", type=int, help="processes; default: one per GPU, one on a machine without GPU")
    restarts = "how often a training whose rank died is resumed (default 0)"
    parser.add_argument("--max-restarts", type=int, default=0, help=restarts)
    least = "resume with one process fewer each time, down to this (default: --nproc)"
    parser.add_argument("--min-nproc", type=int, help=least)
    own, arguments = split_arguments(argv)
    options = parser.parse_args(own)
    if options.nproc is not None and options.nproc < 1:
        raise UserError(f"--nproc is {options.nproc}. Use 1 or more.")
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts is {options.max_restarts}. Use 0 or more.")
    config = parse(arguments)
    nproc = options.nproc or (config.train.device != "cpu" and count_gpus()) or 1
    min_nproc = nproc if options.min_nproc is None else options.min_nproc
    if not 1 <= min_nproc <= nproc:
        raise UserError(f"--min-nproc is {min_nproc} of {nproc} processes. Use 1 to {nproc}.")
    check_world_size(config.train, nproc)
    return [*arguments, "--run.name", choose_name(config, arguments)], nproc, min_nproc, options.max_restarts


def main(argv: list[str]) -> int:
    """Run the training to its end; return its exit code."""
    ranks: Ranks | None = None
    received: list[int] = []  # signals so far

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if ranks is not None:
            ranks.send(number)

    for number in signals.wanted():  # first of all, so that no signal is lost
        signal.signal(number, forward)
    arguments, nproc, min_nproc, max_restarts = read_command_line(argv)
    restart = 0
    while not received:
        ranks = Ranks(nproc, arguments, restart)
        for early in received:  # while they were being started
            ranks.send(early)
        code = ranks.wait()
        if code != CRASHED or received or restart == max_restarts:
            return code
        restart, nproc = restart + 1, max(min_nproc, nproc - 1)
        print(f"launch: restart {restart} of {max_restarts}, {nproc} process(es)", file=sys.stderr, flush=True)
    return PREEMPTED  # before any rank was started

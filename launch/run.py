"""`python -m launch run`: train on this machine, one process per GPU.

Beside torchrun it passes exit codes on (75 stays 75), forwards SIGTERM, SIGINT and SIGUSR2 without killing anyone, leaves
no orphan when it is killed itself, and restarts a run whose rank died. Deliberately not here: several machines (torchrun,
Slurm). torch is not imported: the launcher is up at once and stays small.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO

from train.cli import Parser, did_you_mean, parse, run_name, split_arguments
from train.config import Config
from train.errors import BAD_INPUT, PREEMPTED, UserError
from train.world.process import die_with_parent
from train.world.world import run_suffix

LEAVE_SECONDS = 10.0  # for the other ranks, once one has died: gloo tells them within a second
SAVE_SECONDS = 60.0  # for the other ranks, once one has left with a saved checkpoint
POLL_SECONDS = 0.05
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
DEV = Path("/dev")
TRAIN = (sys.executable, "-m", "train")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
# both would listen on the first interface that reaches other machines
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}


def nvidia_nodes() -> list[Path]:
    """Return the device nodes of NVIDIA's GPUs. A container may hold numbers 2 and 3 alone."""
    return sorted(DEV.glob("nvidia[0-9]*"))


def count_gpus() -> int:
    """Count the GPUs that a training on this machine would see. torch is asked, in a process of its own, if there may be any."""
    if not nvidia_nodes() and not any((DEV / name).exists() for name in ("kfd", "dxg")):  # AMD's GPUs, or those of WSL
        return 0
    command = (sys.executable, "-c", "import torch; print(torch.cuda.device_count())")
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Ranks:
    """The processes of one attempt."""

    def __init__(
        self,
        nproc: int,
        arguments: list[str],
        restart: int,
        *,
        quiet: bool = False,
        output: IO[str] | None = None,
        program: tuple[str, ...] = TRAIN,
    ) -> None:
        self.quiet, self.output, self.program = quiet, output, program
        self.processes: list[subprocess.Popen] = []
        # Ranks inherit the mask and lift it once their handlers stand, seconds later: no signal is lost in between.
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        try:
            self._start(nproc, arguments, restart)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)

    def _start(self, nproc: int, arguments: list[str], restart: int) -> None:
        output = subprocess.DEVNULL if self.quiet else self.output
        command = (*self.program, *arguments)
        tie = functools.partial(die_with_parent, os.getpid())
        # Rank 0 serves the rendezvous on this socket: nobody can take its port, and only this machine can reach it.
        with socket.create_server(("127.0.0.1", 0)) as store:
            for rank in range(nproc):
                env = ON_LOOPBACK | dict(os.environ, LOCKSTEP_RESTART=str(restart))
                if nproc > 1:
                    env |= {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(nproc),
                        "LOCAL_WORLD_SIZE": str(nproc),
                    }
                    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.getsockname()[1])}
                    env |= {"LOCKSTEP_STORE_FD": str(store.fileno())}
                handed = [store.fileno()] if nproc > 1 and rank == 0 else []
                self.processes.append(
                    subprocess.Popen(command, env=env, pass_fds=handed, preexec_fn=tie, stdout=output, stderr=output)
                )

    def send(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Wait for all ranks; once one has left with an error, give the others a while, then kill them.

        Returns the exit code of the attempt: 0, 2, 75, or 1 for every kind of crash.
        """
        deadline = None
        first: tuple[int, int] | None = None
        while True:
            codes = [process.poll() for process in self.processes]
            failed = [(rank, code) for rank, code in enumerate(codes) if code]
            if None not in codes:
                break
            if failed and first is None:
                first = failed[0]
                deadline = time.monotonic() + (SAVE_SECONDS if first[1] == PREEMPTED else LEAVE_SECONDS)
            if deadline is not None and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        if not failed:
            return 0
        first = first or failed[0]
        if (
            first[1] == PREEMPTED
        ):  # all ranks have agreed on it and saved; one that was killed since hung in its last words
            return PREEMPTED
        crashes = [pair for pair in failed if pair[1] not in (PREEMPTED, BAD_INPUT)]
        if not crashes:
            return first[1]
        rank, code = first if first in crashes else crashes[0]
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not self.quiet:
            print(f"launch: rank {rank} ended by {how}", file=self.output or sys.stderr, flush=True)
        return 1


def named(config: Config, arguments: list[str]) -> list[str]:
    """Return the training's arguments with a run name, the same for every restart."""
    return [*arguments, "--run.name", run_name(config, arguments, run_suffix())]


def main(argv: list[str]) -> int:
    """Run the training to its end; return its exit code."""
    ranks: Ranks | None = None
    told: list[int] = []  # signals so far

    def forward(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if ranks is not None:
            ranks.send(number)

    for number in FORWARDED:  # first of all: none may be lost
        signal.signal(number, forward)
    parser = Parser(
        prog="python -m launch run", usage="%(prog)s [OPTIONS] -- TRAIN ARGUMENTS", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--nproc", type=int, help="processes; default: one per GPU, one on a machine without GPU")
    parser.add_argument(
        "--max-restarts", type=int, default=0, help="how often a training whose rank died is resumed (default 0)"
    )
    parser.add_argument(
        "--min-nproc", type=int, help="resume with one process fewer each time, down to this (default: --nproc)"
    )
    own, arguments = split_arguments(argv)
    options, wrong = parser.parse_known_args(own)
    if wrong:
        hint = did_you_mean(
            wrong[0], list(parser._option_string_actions), "The training's arguments stand behind `--`."
        )
        raise UserError(f"launch run has no option {wrong[0]}. {hint}")
    if options.nproc is not None and options.nproc < 1:
        raise UserError(f"--nproc is {options.nproc}. Use 1 or more.")
    if options.max_restarts < 0:
        raise UserError(f"--max-restarts is {options.max_restarts}. Use 0 or more.")
    config = parse(arguments)
    arguments = named(config, arguments)
    nproc = options.nproc or (config.train.device != "cpu" and count_gpus()) or 1
    min_nproc = options.min_nproc or nproc
    if not 1 <= min_nproc <= nproc:
        raise UserError(f"--min-nproc is {min_nproc} of {nproc} processes. Use 1 to {nproc}.")
    for restart in range(options.max_restarts + 1):
        if told:
            return PREEMPTED  # before anything was begun
        ranks = Ranks(nproc, arguments, restart)
        for early in told:  # while they were being started
            ranks.send(early)
        code = ranks.wait()
        if code != 1 or told or restart == options.max_restarts:
            return code
        nproc = max(min_nproc, nproc - 1)
        print(
            f"launch: restart {restart + 1} of {options.max_restarts}, {nproc} process(es)", file=sys.stderr, flush=True
        )
    raise AssertionError("the loop returns")

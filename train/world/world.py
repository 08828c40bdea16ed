"""Who am I: rank, local_rank, world_size, device, the Accelerator; and the collectives that the other modules use.

Invariant: the world that came up is the one that was asked for, or the run stops. The only home of RANK and WORLD_SIZE
and, with reduce.py, of torch.distributed. torch is imported inside functions, so that a rank can refuse a bad config
before it has paid for torch.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from train.config import TrainConfig
from train.errors import RunError, UserError
from train.world.clock import START_TIMEOUT_SECONDS, Clock
from train.world.device import choose_backend, choose_device, set_tf32, tasks_on_node

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

T = TypeVar("T")
# mallopt(3): M_MMAP_MAX 0, no tensor in pages of its own; M_TRIM_THRESHOLD -1, none given back; M_TOP_PAD, asked for at once
MALLOC_OPTIONS = {-4: 0, -1: -1, -2: 64 << 20}
STORE_FD = "LOCKSTEP_STORE_FD"  # the listening socket that `launch run` hands to rank 0
BACKSTOP_SECONDS = 60  # that torch's own timeouts come after the watchdog's, which knows who is to blame


def slurm_variables(env: Mapping[str, str]) -> dict[str, str]:
    """What torch's launchers set, for a rank that srun started directly; empty for others.

    `SLURM_STEP_NODELIST` may be node[01-03,7],x: the first host has rank 0. The port depends on job, life and step, so that
    jobs that share a node, and a life that a lost node left behind, do not meet.
    """
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or "RANK" in env or "WORLD_SIZE" in env:
        return {}
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", env["SLURM_STEP_NODELIST"])
    number = (
        16 * int(env["SLURM_JOB_ID"])
        + 4 * int(env.get("SLURM_RESTART_COUNT") or 0)
        + int(env.get("SLURM_STEP_ID", "0"))
    )
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_on_node(env)),
        "MASTER_ADDR": env.get("MASTER_ADDR") or re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else ""),
        "MASTER_PORT": env.get("MASTER_PORT") or str(15000 + number % 15000),
    }


def env_ranks() -> tuple[int, int]:
    """This process's rank and local rank as its launcher set them; 0 without a launcher."""
    env = os.environ | slurm_variables(os.environ)
    return int(env.get("RANK", "0")), int(env.get("LOCAL_RANK", "0"))


def is_restart() -> bool:
    """Whether a launcher or Slurm has started this run before, with the same arguments."""
    counts = ("LOCKSTEP_RESTART", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) for name in counts)


def run_suffix() -> str:
    """What tells this run from others of its recipe: the id of a sweep, torchrun or Slurm, which restarts share, or the time."""
    if "WANDB_SWEEP_ID" in os.environ:
        return os.environ["WANDB_RUN_ID"]
    identity = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if identity != "none":
        return identity
    if "SLURM_STEP_ID" in os.environ and "SLURM_PTY_PORT" not in os.environ:  # not at an interactive prompt
        return f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"  # the same after a requeue
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UserError(
            "torchrun --max-restarts needs --run.name (or its --rdzv-id): a restart must find the same run."
        )
    return time.strftime("%Y%m%d-%H%M%S")


def check_launcher(config: TrainConfig) -> int:
    """Return the world size that the launcher asked for; raise UserError where it would silently give another one."""
    env = os.environ
    if "WORLD_SIZE" not in env and "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        raise UserError(
            "accelerate launch was asked for several processes and started one (its CPU launcher does that). Use "
            "`accelerate launch --multi_gpu --num_processes N` with ACCELERATE_USE_CPU=1, or torchrun --nproc-per-node N."
        )
    asked = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no" and asked != config.precision:
        raise UserError(
            f"accelerate launch asks for mixed precision {asked}, train.precision is {config.precision}. "
            f"Use --train.precision {asked}, or leave it out of accelerate's config."
        )
    if env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise UserError("Set train.micro_batch_limit instead of accelerate's gradient_accumulation_steps.")
    return int(env.get("WORLD_SIZE", "1"))


def make_accelerator(config: TrainConfig, device: torch.device, timeout: timedelta) -> Accelerator:
    """Join the process group, if nothing has yet; set precision and DDP. Collective: every rank must call it."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    backend = {"backend": choose_backend(device)} if "RANK" in os.environ else {}  # a single process has no group
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate explains OMP_NUM_THREADS, which we set
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=config.precision if config.precision in ("bf16", "fp16") else "no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timeout, **backend),
            ],
            step_scheduler_with_optimizer=False,
        )


def join_on_loopback(device: torch.device, timeout: timedelta) -> None:
    """Join the process group of `launch run`, whose store listens on the loopback interface alone (on all of them by default).

    The launcher has opened the socket, rank 0 serves on it. Collective: every rank must call it.
    """
    import torch.distributed as dist

    env = os.environ
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    listener = int(env[STORE_FD]) if rank == 0 else None
    place = (env["MASTER_ADDR"], int(env["MASTER_PORT"]))
    store = dist.TCPStore(*place, world_size, rank == 0, timeout, master_listen_fd=listener)
    dist.init_process_group(choose_backend(device), store=store, rank=rank, world_size=world_size, timeout=timeout)


def tune_malloc() -> None:
    """Let glibc keep freed memory for the next step instead of giving it back to the kernel, which hands it out anew, zeroed.

    A step on a CPU allocates the same large tensors again and again: page faults would cost a third of its time (docs/log.md).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for parameter, value in MALLOC_OPTIONS.items() if hasattr(libc, "mallopt") else ():  # musl has none
            libc.mallopt(parameter, value)


@dataclasses.dataclass
class World:
    """One process's place among all, and its Accelerator."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    num_threads: int
    accelerator: Accelerator
    tf32_before: tuple[bool, bool]
    clock: Clock = dataclasses.field(default_factory=Clock)

    @classmethod
    def open(cls, config: TrainConfig) -> World:
        """Join the process group. Collective: every rank must call it. Close it in a `finally`."""
        os.environ.update(slurm_variables(os.environ))
        asked = check_launcher(config)
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        import torch

        device = choose_device(config, local_rank, local_world_size)
        if device.type == "cpu":
            tune_malloc()
        elif device.index != local_rank:
            os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # accelerate would give DDP the GPU number LOCAL_RANK
        if asked == 1:  # torchrun with one process would get DDP around the model, and other gradients than without
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_threads = config.num_threads or (1 if config.exact else max(1, cores // local_world_size))
        if config.exact:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)  # Inductor's too: it then tunes nothing by timing
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # by NaN: to find bugs
            torch.backends.cudnn.benchmark = False
        tf32_before = set_tf32(config.precision == "tf32", config.precision == "tf32")
        timeout = timedelta(seconds=max(START_TIMEOUT_SECONDS, config.timeout) + BACKSTOP_SECONDS)
        if STORE_FD in os.environ:
            join_on_loopback(device, timeout)
        accelerator = make_accelerator(config, device, timeout)
        torch.set_num_threads(num_threads)  # after Accelerator(), which sets it to its own idea on several ranks
        world = cls(
            rank=accelerator.process_index,
            local_rank=accelerator.local_process_index,
            world_size=accelerator.num_processes,
            local_world_size=local_world_size,
            device=device,
            num_threads=num_threads,
            accelerator=accelerator,
            tf32_before=tf32_before,
        )
        world.clock.limit = max(START_TIMEOUT_SECONDS, config.timeout)
        if world.world_size != asked:
            world.close()
            raise UserError(
                f"The launcher asked for {asked} processes and {world.world_size} came up. Start with `python -m launch run`."
            )
        if world.world_size > 1 and world.device.type == "cuda":
            from train.world.meter import DeviceMeter

            world.clock.meter = DeviceMeter()
        return world

    def close(self) -> None:
        """Leave the process group (otherwise some exits end in SIGABRT) and forget accelerate's global state."""
        import torch
        import torch.distributed as dist
        from accelerate.state import AcceleratorState

        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(True)
        if torch.are_deterministic_algorithms_enabled():  # the call imports Inductor's config, which takes time
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        set_tf32(*self.tf32_before)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only rank that writes to the run directory."""
        return self.rank == 0

    @property
    def runs_ahead(self) -> bool:
        """Whether the host runs ahead of the device, so that reading a number means waiting."""
        return self.device.type == "cuda"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Put model and optimizer into accelerate's wrappers: precision, and DDP on several ranks.

        Collective: every rank must call it.
        """
        with warnings.catch_warnings():
            # broadcast_buffers has a new name since torch 2.13, which accelerate 1.15 and torch 2.11 do not know
            warnings.simplefilter("ignore", FutureWarning)
            return self.accelerator.prepare(model, optimizer)

    def set_timeout(self, seconds: int) -> None:
        """Shorten the time without progress that the watchdog allows, and that of a collective without all ranks."""
        import torch.distributed as dist

        self.clock.limit = seconds

        if dist.is_initialized():
            # torch 2.13 made it public; we support 2.11 on
            set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)
            set_timeout(timedelta(seconds=seconds + BACKSTOP_SECONDS))

    def wait(self, event: torch.cuda.Event | None = None) -> None:
        """Wait until a GPU has done all work so far, or until `event`. On several, in phase `reduce`: that includes collectives.

        The host of a rank runs ahead of its GPU and waits for the other ranks only where it reads numbers of the device. Call
        this before such a read, or the watchdog takes the wait for this rank's own work. Not needed on a CPU.
        """
        if self.device.type == "cuda":
            import torch

            before = self.clock.enter("reduce" if self.world_size > 1 else self.clock.phase)
            event.synchronize() if event is not None else torch.cuda.synchronize(self.device)
            self.clock.enter(before)

    def all_reduce_sum_(self, values: Tensor) -> Tensor:
        """Add `values` over all ranks, in place; int64 sums wrap. Collective: every rank must call it."""
        if self.world_size > 1:
            import torch.distributed as dist

            on_device = values.to(self.device)
            with self.clock.collective("all_reduce"):
                dist.all_reduce(on_device)
                values.copy_(on_device)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value, of JSON's types, on every rank. Collective: every rank must call it."""
        if self.world_size == 1:
            return value
        return json.loads(self.broadcast_bytes(json.dumps(value).encode()))

    def broadcast_bytes(self, content: bytes, source: int = 0) -> bytes:
        """Return the bytes of rank `source` on every rank. Collective: every rank must call it.

        Object collectives of torch.distributed would be shorter; they unpickle what arrives.
        """
        if self.world_size == 1:
            return content
        import torch
        import torch.distributed as dist

        with self.clock.collective("broadcast"):
            size = torch.tensor([len(content)], device=self.device)
            dist.broadcast(size, source)
            if not size:
                return b""
            buffer = torch.empty(int(size), dtype=torch.uint8, device=self.device)
            if self.rank == source:
                buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            dist.broadcast(buffer, source)
            return buffer.cpu().numpy().tobytes()

    def raise_on_all_ranks(self, error: UserError | RunError | None) -> None:
        """Raise the first rank's error on every rank, if any has one. Collective: every rank must call it."""
        if self.world_size > 1:
            import torch
            import torch.distributed as dist

            first = torch.tensor([self.world_size if error is None else self.rank], device=self.device)
            with self.clock.collective("all_reduce"):
                dist.all_reduce(first, dist.ReduceOp.MIN)
                source = int(first)  # on a GPU, the wait for the others
            if source == self.world_size:
                return
            named = json.dumps([type(error).__name__, str(error)]).encode()
            name, message = json.loads(self.broadcast_bytes(named, source))
            kinds: list[type[UserError | RunError]] = [UserError, RunError, *UserError.__subclasses__()]
            raise {kind.__name__: kind for kind in kinds}[name](message)
        if error is not None:
            raise error

"""This process among the others: its rank and device, the Accelerator, and the collectives that other modules use.

Invariant: the world size is the one that the launcher asked for, or the run stops. With reduce.py this is the only home
of torch.distributed.
"""

import collections
import contextlib
import dataclasses
import json
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from train.config import TrainConfig
from train.errors import RunError, UserError, one_line
from train.world import signals
from train.world.clock import START_TIMEOUT_SECONDS, Clock, DeviceMeter
from train.world.cores import choose_num_threads
from train.world.device import choose_backend, choose_device, set_arithmetic
from train.world.launcher import Placement, accept_placement, is_local_rank_given, store_address
from train.world.process import tune_malloc

T = TypeVar("T")
STORE_FD = "LOCKSTEP_STORE_FD"  # the listening socket that `launch run` hands to rank 0
BACKSTOP_SECONDS = 60  # torch's own timeout comes at least that long after the watchdog's, which names the culprit


@signals.left_to_thread()
def join(device: torch.device, place: Placement, timeout: timedelta) -> None:
    """Join the process group. Collective: every rank must call it.

    By default, torch's store listens on all interfaces. `launch run` therefore opens the socket, on the loopback
    interface alone, and rank 0 serves the store on it. Raises RunError if the ranks do not find each other in time.
    """
    store, (host, port) = None, store_address()
    try:
        if STORE_FD in os.environ:
            is_server = place.rank == 0
            listener = int(os.environ[STORE_FD]) if is_server else None
            store = dist.TCPStore(host, port, place.world_size, is_server, timeout, master_listen_fd=listener)
        elif place.local_world_size == 1 < place.world_size and not is_local_rank_given():
            store, *_ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout))
            refuse_shared_machine(store, place)
        dist.init_process_group(
            choose_backend(device), store=store, rank=place.rank, world_size=place.world_size, timeout=timeout
        )
    except RuntimeError as error:  # torch's or gloo's
        raise RunError(
            f"rank {place.rank} could not join {place.world_size} ranks at {host}, port {port}: "
            f"{one_line(error).rstrip('.')}. Is that rank 0's machine, is the port free, and are all ranks running?"
        ) from error


def refuse_shared_machine(store: dist.Store, place: Placement) -> None:
    """Raise UserError if two ranks are on one machine: both would use its first GPU and all of its cores.

    Collective: every rank must call it. It needs no process group, whose first use NCCL would refuse.
    """
    names = [f"host-{rank}" for rank in range(place.world_size)]
    store.set(names[place.rank], socket.gethostname())
    hosts = store.multi_get(names)  # waits for all of them
    store.set(f"{names[place.rank]}-done", "")
    if place.rank == 0:  # it serves the store, so it leaves last
        store.wait([f"{name}-done" for name in names])
    host, count = collections.Counter(hosts).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{count} ranks are on {host.decode()}, and LOCAL_RANK and LOCAL_WORLD_SIZE are unset. Set both for every "
            "rank, or use torchrun."
        )


def make_accelerator(config: TrainConfig, device: torch.device) -> Accelerator:
    """Return the Accelerator of the process group that this process has joined, or of this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate explains OMP_NUM_THREADS, which we set
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=config.precision if config.precision in ("bf16", "fp16") else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
            step_scheduler_with_optimizer=False,
        )


@dataclasses.dataclass(frozen=True)
class World(Placement):
    """One process's place among all, and its Accelerator."""

    device: torch.device
    num_threads: int
    accelerator: Accelerator
    clock: Clock

    @classmethod
    def open(cls, config: TrainConfig) -> "World":
        """Join the process group. Collective: every rank must call it. Close it in a `finally`."""
        place = accept_placement(config)
        device = choose_device(config, place.local_rank, place.local_world_size)
        if device.type == "cpu":
            tune_malloc()
        elif device.index != place.local_rank:
            os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # accelerate would give DDP the GPU number LOCAL_RANK
        set_arithmetic(is_exact=config.exact, is_tf32=config.precision == "tf32")
        limit = max(START_TIMEOUT_SECONDS, config.timeout)
        if place.world_size > 1:
            join(device, place, timedelta(seconds=limit + BACKSTOP_SECONDS))
        accelerator = make_accelerator(config, device)
        num_threads = choose_num_threads(config, place)
        torch.set_num_threads(num_threads)  # after Accelerator(), which sets a number of its own on several ranks
        clock = Clock(DeviceMeter() if place.world_size > 1 and device.type == "cuda" else None)
        clock.limit = limit
        world = cls(
            **dataclasses.asdict(place), device=device, num_threads=num_threads, accelerator=accelerator, clock=clock
        )
        if accelerator.num_processes != place.world_size:
            world.close()
            raise UserError(
                f"The launcher asked for {place.world_size} processes, but {accelerator.num_processes} joined. "
                "Start with `python -m launch run`."
            )
        return world

    def close(self) -> None:
        """Leave the process group (otherwise some exits end in SIGABRT) and reset accelerate's global state."""
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(True)
        set_arithmetic(is_exact=False, is_tf32=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only rank that writes to the run directory."""
        return self.rank == 0

    @property
    def runs_ahead(self) -> bool:
        """Whether the host runs ahead of the device, so that reading a number means waiting."""
        return self.device.type == "cuda"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Return model and optimizer in accelerate's wrappers: precision, and DDP on several ranks.

        Collective: every rank must call it.
        """
        with warnings.catch_warnings():
            # torch 2.13 renamed broadcast_buffers; accelerate 1.15 and torch 2.11 still need the old name
            warnings.simplefilter("ignore", FutureWarning)
            return self.accelerator.prepare(model, optimizer)

    def wait(self, event: torch.cuda.Event | None = None) -> None:
        """Wait until the GPU has done all work so far, or until `event`. Return at once on a CPU.

        A host runs ahead of its GPU. It waits for other ranks only when it reads a number from the device. Call this
        before such a read: it enters the phase `reduce`, or else the watchdog would mistake the wait for this rank's
        own work.
        """
        if self.device.type == "cuda":
            before = self.clock.enter("reduce" if self.world_size > 1 else self.clock.phase)
            if event is not None:
                event.synchronize()
            else:
                torch.cuda.synchronize(self.device)
            self.clock.enter(before)

    def all_reduce_sum_(self, values: Tensor) -> Tensor:
        """Add `values` over all ranks, in place; int64 sums wrap. Collective: every rank must call it."""
        if self.world_size > 1:
            on_device = values.to(self.device)
            with self.clock.collective():
                dist.all_reduce(on_device)
                values.copy_(on_device)
        return values

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the value of rank `source`, of JSON's types, on every rank. Collective: every rank must call it."""
        return json.loads(self.broadcast_bytes(json.dumps(value).encode(), source))

    def broadcast_bytes(self, content: bytes, source: int = 0) -> bytes:
        """Return the bytes of rank `source` on every rank. Collective: every rank must call it.

        The object collectives of torch.distributed would be shorter, but they unpickle what arrives.
        """
        if self.world_size == 1:
            return content
        with self.clock.collective():
            size = torch.tensor([len(content)], device=self.device)
            dist.broadcast(size, source)
            if not size:
                return b""
            buffer = torch.empty(int(size), dtype=torch.uint8, device=self.device)
            if self.rank == source:
                buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            dist.broadcast(buffer, source)
            return buffer.cpu().numpy().tobytes()

    @contextlib.contextmanager
    def raising_together(self) -> Iterator[None]:
        """Raise the first UserError or RunError of the block on every rank. Collective: every rank must call it."""
        error: UserError | RunError | None = None
        try:
            yield
        except (UserError, RunError) as problem:
            error = problem
        has_error = torch.zeros(self.world_size, dtype=torch.int64)
        has_error[self.rank] = error is not None
        sources = self.all_reduce_sum_(has_error).nonzero()
        if len(sources):
            name, message = self.broadcast([type(error).__name__, str(error)], int(sources[0]))
            kinds = {kind.__name__: kind for base in (UserError, RunError) for kind in (base, *base.__subclasses__())}
            raise kinds[name](message) from error

"""One rank of a world whose other ranks do not exist: the program's real objects on torch's fake process group.

What a plan says of bytes and memory is counted here, in a step that train/loop.py makes itself, and not written down a
second time. Invariant: no GPU, no data set and no network is needed. The gradients are wrong (nobody answers), sizes are not.
"""

import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from train.config import Config

if TYPE_CHECKING:
    from train.run import Run
    from train.storage.data import Data
    from train.world.world import World

Traffic = list[tuple[str, int]]  # (what, bytes of its payload) of each communication of a rank, in order


@contextlib.contextmanager
def environment(rank: int = 0, world_size: int = 1, local_world_size: int = 1) -> Iterator[None]:
    """Give this process the environment of a rank, without what its own launcher has set, and put the old one back."""
    place = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank % local_world_size,
        "LOCAL_WORLD_SIZE": local_world_size,
    }
    with mock.patch.dict(
        os.environ, {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": socket.gethostname()}
    ):
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "SLURM_", "LOCKSTEP_"))]:
            del os.environ[name]
        yield


@contextlib.contextmanager
def fake_world(config: Config, rank: int, world_size: int, local_world_size: int) -> "Iterator[World]":
    """Open `rank` of a world in which every collective returns at once and nothing is sent."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from train.world.world import World

    with environment(rank, world_size, local_world_size):
        if world_size > 1:
            dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        # fp16 and tf32 are for GPUs alone; these take as many bytes
        precision: Literal["bf16", "fp32"] = "bf16" if config.train.precision in ("bf16", "fp16") else "fp32"
        world = World.open(dataclasses.replace(config.train, device="cpu", precision=precision, num_threads=1))
        try:
            yield world
        finally:
            world.close()


def blank_data(config: Config, num_examples: int, num_test_examples: int) -> "Data":
    """A data set of the right size whose images are all the same one: it takes no memory."""
    import torch

    from train.storage.data import Data, Split

    def blank(num: int) -> Split:
        return Split(
            torch.zeros(1, 1, 28, 28, dtype=torch.uint8).expand(num, 1, 28, 28),
            torch.zeros(1, dtype=torch.int64).expand(num),
        )

    return Data(config.data.name, blank(num_examples), blank(num_test_examples), "test", "0" * 64, 0.0, 1.0, False)


@contextlib.contextmanager
def counted(run: "Run") -> Iterator[Traffic]:
    """Enter what the run's rank hands to torch.distributed: each bucket of gradients, and every other communication."""
    import torch
    import torch.distributed as dist

    from train.world.reduce import Allreduce

    traffic: Traffic = []

    def entering(name: str, original: Callable, size: Callable[[Any], int]) -> Callable:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            traffic.append((name, size(arguments[0])))
            return original(*arguments, **named)

        return wrapped

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        traffic.append(("gradients", bucket.buffer().nbytes))
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future  # DDP's own all-reduce asserts on the fake group

    if run.world.world_size > 1 and isinstance(run.reducer, Allreduce):
        run.model.register_comm_hook(None, hook)  # type: ignore[operator]
    sizes = {
        "all_reduce": ("table", lambda tensor: tensor.nbytes),
        "batch_isend_irecv": ("exchange", lambda operations: operations[0].tensor.nbytes),
        "all_gather": ("gather", lambda tensors: tensors[0].nbytes),
    }
    with contextlib.ExitStack() as stack:
        for function, (name, size) in sizes.items():
            stack.enter_context(mock.patch.object(dist, function, entering(name, getattr(dist, function), size)))
        yield traffic


def saved_bytes(run: "Run", num_examples: int) -> int:
    """Bytes that autograd keeps of a forward pass of `num_examples` until its backward, beside the weights."""
    import torch
    import torch.nn.functional as F

    weights = {tensor.untyped_storage().data_ptr() for tensor in run.module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = torch.zeros(num_examples, 1, 28, 28).to(memory_format=run.memory_format)
    labels = torch.zeros(num_examples, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(
            run.module(inputs, labels).float(), labels, reduction="sum"
        )  # labels serve as dropout's keys
    kept[loss.data_ptr()] = loss.nbytes  # and holds the graph, so that no address above was used twice
    return sum(size for address, size in kept.items() if address not in weights)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a dry run counted; bytes, of one rank."""

    traffic: Traffic
    checkpoint: dict[str, int]  # file -> bytes
    parameters: int
    optimizer: int
    ema: int
    saved_fixed: int  # what autograd keeps: this, and ...
    saved_per_example: int  # ... this for each example of a micro-batch
    num_parameters: int


def measure(
    config: Config, rank: int, world_size: int, local_world_size: int, micro_batches: int, num: tuple[int, int]
) -> Sizes:
    """Let one rank make one step, of two examples per micro-batch, and count; `num` are train and test examples."""
    from train.run import make_state, set_up
    from train.step import train_step
    from train.storage import checkpoint

    train = dataclasses.replace(
        config.train,
        micro_batches=micro_batches,
        global_batch_size=2 * micro_batches,
        micro_batch_limit=0,
        compile=False,
    )
    config = dataclasses.replace(config, train=train)
    with fake_world(config, rank, world_size, local_world_size) as world:
        run = set_up(config, world, blank_data(config, *num))
        with counted(run) as traffic:
            train_step(run)
            traffic = list(traffic)
        state = make_state(run)
        two, four = saved_bytes(run, 2), saved_bytes(run, 4)
        return Sizes(
            traffic=traffic,
            checkpoint={name: len(content) for name, content in checkpoint.encode(state).items()},
            parameters=sum(tensor.nbytes for tensor in run.module.state_dict().values()),
            optimizer=sum(tensor.nbytes for tensor in state.optimizer.values()),
            ema=sum(tensor.nbytes for tensor in state.ema.values()),
            saved_fixed=2 * two - four,
            saved_per_example=(four - two) // 2,
            num_parameters=sum(parameter.numel() for parameter in run.module.parameters()),
        )

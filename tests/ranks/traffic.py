"""A rank of a real gloo group that makes one step and prints what it computed and what it handed to torch.distributed."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from train.cli import parse
from train.run import set_up
from train.step import train_step
from train.storage import data
from train.world.world import World


def main(argv: list[str]) -> int:
    config = parse(argv)
    world = World.open(config.train)
    sent: Counter[str] = Counter()

    def count(function: str, name: str, size: Callable[[Any], int]) -> None:
        original = getattr(dist, function)

        def counted(*arguments: Any, **named: Any) -> Any:
            sent[name] += size(arguments[0])
            return original(*arguments, **named)

        setattr(dist, function, counted)

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent["gradients"] += bucket.buffer().nbytes
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())  # not reduced: only its size counts here
        return future

    try:
        run = set_up(config, world, data.load(config.data, world))
        if not config.train.exact:
            run.model.register_comm_hook(dist.group.WORLD, hook)  # type: ignore[operator]
        count("batch_isend_irecv", "exchange", lambda operations: operations[0].tensor.nbytes)
        count("all_gather", "gather", lambda tensors: tensors[0].nbytes)
        count("all_reduce", "statistics", lambda tensor: tensor.nbytes)
        train_step(run)
        own = run.sampler.own_micro_batches(world.rank, world.world_size)
        found = {
            "sent": sent,
            "micro_batches": [own.start, own.stop],
            "num_rows": len(run.tables.examples[0]),
            "total_steps": run.total_steps,
            "num_parameters": sum(parameter.numel() for parameter in run.module.parameters()),
            "optimizer_bytes": sum(
                value.nbytes for state in run.optimizer.state.values() for value in state.values() if value is not None
            ),
        }
        print(json.dumps(found))
    finally:
        world.close()
    return 0

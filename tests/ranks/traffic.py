"""Make one step as a rank of a real gloo group; print what it computed and what it handed to torch.distributed."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from in_process import Run

from train.cli import parse
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
        run = Run.open(config, world)
        plan, state = run.plan, run.state
        if not config.train.exact:
            state.model.register_comm_hook(dist.group.WORLD, hook)  # type: ignore[operator]
        count("batch_isend_irecv", "exchange", lambda operations: operations[0].tensor.nbytes)
        count("all_gather", "gather", lambda tensors: tensors[0].nbytes)
        count("all_reduce", "statistics", lambda tensor: tensor.nbytes)
        run.steps()
        found = {
            "sent": sent,
            "micro_batches": [plan.own.start, plan.own.stop],
            "num_rows": len(plan.tables.examples[0]),
            "total_steps": plan.total_steps,
            "num_parameters": sum(parameter.numel() for parameter in state.parameters),
            "optimizer_bytes": sum(
                value.nbytes for each in state.optimizer.state.values() for value in each.values() if value is not None
            ),
        }
        print(json.dumps(found))
    finally:
        world.close()
    return 0

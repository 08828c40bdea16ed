"""A rank of a real gloo group that makes one step and prints the bytes of the buckets that a DDP hook of its own saw."""

import json
from typing import Any

import torch
import torch.distributed as dist
from runs import Run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from train.cli import parse
from train.world.world import World


def main(argv: list[str]) -> int:
    config = parse(argv)
    world = World.open(config.train)
    try:
        run = Run.open(config, world)
        seen: list[int] = []

        def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            seen.append(bucket.buffer().nbytes)
            return allreduce_hook(state, bucket)

        run.state.model.register_comm_hook(dist.group.WORLD, hook)  # type: ignore[operator]
        run.steps()
        print(json.dumps(seen))
    finally:
        world.close()
    return 0

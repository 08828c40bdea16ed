"""Train a few exact steps of a config on noise twice in this process, to see whether the bits repeat (`launch doctor`).

Invariant: torch's settings and the environment are afterwards what they were before.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from unittest import mock

from train.config import Config, DataConfig

STEPS, MOST_EXAMPLES = 3, 512  # of a step


def train_twice(config: Config) -> tuple[str, str, str]:
    """Return the SHA-256 of the weights after each of two trainings, and the device: cpu or cuda."""
    from train.world.device import choose_device

    device = choose_device(config.train, 0, 1).type
    with untouched_process():
        return train(short(config, device)), train(short(config, device)), device


@contextlib.contextmanager
def untouched_process() -> Iterator[None]:
    """Hide the caller's launcher from the environment; put the environment and torch's settings back at the end."""
    import torch

    num_threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    with mock.patch.dict(os.environ):
        for name in list(os.environ):
            if name.startswith(("ACCELERATE_", "SLURM_", "LOCKSTEP_", "RANK", "WORLD_SIZE", "LOCAL_")):
                del os.environ[name]
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)
            torch.backends.cudnn.benchmark = benchmark
            torch.use_deterministic_algorithms(was_deterministic)


def short(config: Config, device: str) -> Config:
    """Return the config of a few exact steps on noise with the same model, optimizer and precision."""
    parts = config.train.num_micro_batches or 1
    size = parts * max(1, min(config.train.global_batch_size, MOST_EXAMPLES) // parts)
    changes = {
        "device": device,
        "exact": True,
        "max_steps": STEPS,
        "global_batch_size": size,
        "num_micro_batches": parts,
    }
    changes |= {"max_micro_batch_size": 0, "compile": False, "cuda_graphs": "off"}
    data = DataConfig(name="random", random_examples=6 + STEPS * size)
    train = dataclasses.replace(config.train, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(config, train=train, data=data)


def train(config: Config) -> str:
    """Train to the end, without checkpoints or logs; return the SHA-256 of the weights."""
    from train.state import set_up
    from train.step import prepare_step, train_step
    from train.storage import checkpoint, data
    from train.world.world import World

    world = World.open(config.train)
    try:
        plan, state = set_up(config, world, data.load(config.data, world))
        while state.step < plan.total_steps:
            prepare_step(plan, state)
            train_step(plan, state)
            state.step += 1
        return checkpoint.tensors_sha256(state.module.state_dict())
    finally:
        world.close()

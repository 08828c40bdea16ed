"""Where a rank computes and in which arithmetic: its device, the backend of its collectives, TF32 on or off.

Invariant: a rank gets the device and the arithmetic that the config asks for, or a UserError. torch is imported inside
functions, as in world.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from train.config import TrainConfig
from train.errors import UserError

if TYPE_CHECKING:
    import torch

SHARE_GPU = "LOCKSTEP_SHARE_GPU"  # for tests on one GPU: gloo or nccl (2.30 or newer) lets several ranks share it
NATIVE_CAPABILITY = (8, 0)  # the first GPUs that compute in bf16 and TF32; older ones emulate bf16 or fail


def tasks_on_node(env: Mapping[str, str]) -> int:
    """Return how many tasks of this Slurm step run on this node; 0 outside of a step.

    `SLURM_STEP_TASKS_PER_NODE` may be 2(x3),1.
    """
    tasks: list[int] = []
    for group in env.get("SLURM_STEP_TASKS_PER_NODE", "0").split(","):
        count, _, times = group.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    return tasks[int(env.get("SLURM_NODEID", "0"))] if any(tasks) else 0


def num_gpus_for(num_visible: int, local_rank: int, local_world_size: int) -> int:
    """Return how many GPUs the ranks of this machine have between them.

    These are the visible ones. Only srun may bind its tasks to GPUs: then each task sees its own, all together what
    `SLURM_GPUS_ON_NODE` says. The ranks of a launcher that runs inside a task share the GPUs of that task.
    """
    env = os.environ
    is_task = env.get("SLURM_LOCALID") == str(local_rank) and tasks_on_node(env) == local_world_size
    return max(num_visible, int(env.get("SLURM_GPUS_ON_NODE", local_world_size))) if is_task else num_visible


def choose_device(config: TrainConfig, local_rank: int, local_world_size: int) -> torch.device:
    """Return this rank's device; raise UserError where the machine cannot do what the config asks."""
    import torch

    use_cpu = config.device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    num_visible = 0 if use_cpu else torch.cuda.device_count()
    if not num_visible:
        if config.device == "cuda":
            raise UserError("train.device is cuda and this machine shows no GPU. Use train.device auto or cpu.")
        if config.precision in ("fp16", "tf32"):
            raise UserError(
                f"train.precision {config.precision} needs a GPU: on a CPU it silently runs in fp32. Use bf16 or fp32."
            )
        return torch.device("cpu")
    num_gpus = num_gpus_for(num_visible, local_rank, local_world_size)
    if local_world_size > num_gpus and SHARE_GPU not in os.environ:
        raise UserError(
            f"{local_world_size} processes on this machine, but {num_gpus} GPU(s). Start {num_gpus}, or use --train.device cpu."
        )
    device = torch.device("cuda", local_rank % num_visible)
    if config.precision in ("bf16", "tf32") and torch.cuda.get_device_capability(device) < NATIVE_CAPABILITY:
        raise UserError(f"This GPU does not compute in {config.precision}. Use train.precision fp16 or fp32.")
    return device


def choose_backend(device: torch.device) -> str:
    """Return the backend of torch.distributed for ranks on such a device."""
    if device.type == "cpu":
        return "gloo"
    backend = os.environ.get(SHARE_GPU, "nccl")
    if backend not in ("gloo", "nccl"):
        raise UserError(f"{SHARE_GPU} is {backend}. Use gloo or nccl, or unset it.")
    return backend


def set_tf32(in_convolutions: bool, in_products: bool) -> tuple[bool, bool]:
    """Switch TF32 on or off in a GPU's convolutions and in its matrix products; return how it was before.

    torch has it on in convolutions. Its newer settings (`fp32_precision`) are not used: what still reads these ones, such
    as Inductor, then raises. Neither touches the CPU.
    """
    import torch

    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, products.allow_tf32
    cudnn.allow_tf32, products.allow_tf32 = in_convolutions, in_products
    return before

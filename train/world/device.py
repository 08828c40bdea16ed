"""Where a rank computes and in which arithmetic: its device, its collectives' backend, TF32, deterministic kernels.

Invariant: a rank gets the device and the arithmetic that the config asks for, or a UserError.
"""

import os

import torch

from train.config import TrainConfig
from train.errors import UserError
from train.world.launcher import is_cpu_required, is_slurm_task

SHARE_GPU = "LOCKSTEP_SHARE_GPU"  # for tests: ranks share one GPU and exchange by gloo or nccl (2.30 or newer)
NATIVE_CAPABILITY = (8, 0)  # of the first GPUs with bf16 and TF32; older ones emulate bf16 or fail


def num_gpus_for(num_visible: int, local_rank: int, local_world_size: int) -> int:
    """Return how many GPUs the ranks of this machine have between them.

    That is the number of visible GPUs, except under srun, which may bind each task to GPUs of its own. All tasks
    together then have `SLURM_GPUS_ON_NODE`. The ranks of a launcher that runs inside a task share the GPUs of that
    task.
    """
    if not is_slurm_task(os.environ, local_rank, local_world_size):
        return num_visible
    return max(num_visible, int(os.environ.get("SLURM_GPUS_ON_NODE", local_world_size)))


def choose_device(config: TrainConfig, local_rank: int, local_world_size: int) -> torch.device:
    """Return this rank's device. Raises UserError if the machine lacks what the config asks for."""
    use_cpu = config.device == "cpu" or is_cpu_required(os.environ)
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
            f"{local_world_size} processes on this machine, but {num_gpus} GPU(s). "
            f"Start {num_gpus}, or use --train.device cpu."
        )
    device = torch.device("cuda", local_rank % num_visible)
    if config.precision in ("bf16", "tf32") and torch.cuda.get_device_capability(device) < NATIVE_CAPABILITY:
        raise UserError(f"This GPU has no native {config.precision}. Use train.precision fp16 or fp32.")
    return device


def choose_backend(device: torch.device) -> str:
    """Return the backend of torch.distributed for ranks on a kind of device."""
    return "gloo" if device.type == "cpu" else os.environ.get(SHARE_GPU, "nccl")


def set_arithmetic(*, is_exact: bool, is_tf32: bool) -> None:
    """Switch deterministic algorithms on or off, and TF32 in a GPU's convolutions and matrix products.

    By default, torch has TF32 on in convolutions. `World.close` leaves it off. Torch's newer `fp32_precision` settings
    are not used: code that still reads these ones, such as Inductor, would raise. Neither affects the CPU.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = is_tf32
    if is_exact:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the user's may be one that has other bits, or none
        torch.backends.cudnn.benchmark = False
    if is_exact or torch.are_deterministic_algorithms_enabled():  # the call imports Inductor's config, which takes time
        torch.use_deterministic_algorithms(is_exact)  # Inductor's too: it then tunes nothing by timing
        # torch would fill new tensors with NaN, which finds bugs but takes time
        torch.utils.deterministic.fill_uninitialized_memory = not is_exact  # type: ignore[attr-defined]

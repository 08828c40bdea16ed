"""The environment variables of `launch run`, torchrun, accelerate and srun: a process's place, and its run's identity.

This is the only home of RANK and WORLD_SIZE.
"""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from train.config import TrainConfig
from train.errors import UserError

SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # without a launcher
RESTART_COUNTS = ("LOCKSTEP_RESTART", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class Placement:
    """The place of this process among all, in torch's words."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_placement() -> Placement:
    """Return the placement that the launcher's environment variables describe, or that of a single process."""
    env = SINGLE | os.environ | slurm_variables(os.environ)
    return Placement(*(int(env[name]) for name in SINGLE))


def store_address() -> tuple[str, int]:
    """Return the host and port on which rank 0 serves the store of the process group."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def accept_placement(config: TrainConfig) -> Placement:
    """Return the placement, and set the environment variables that torch reads to match it.

    Raises UserError if accelerate would silently start another world size or precision than it was asked for.
    """
    env = os.environ
    env.update(slurm_variables(env))
    if "WORLD_SIZE" not in env and "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as its CPU launcher does. "
            "Use `accelerate launch --multi_gpu --num_processes N` with ACCELERATE_USE_CPU=1, "
            "or `torchrun --nproc-per-node N`."
        )
    asked = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", config.precision):
        raise UserError(
            f"accelerate launch asks for mixed precision {asked}, train.precision is {config.precision}. "
            f"Use --train.precision {asked}, or leave mixed precision out of accelerate's config."
        )
    if env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise UserError("Set train.max_micro_batch_size instead of accelerate's gradient_accumulation_steps.")
    placement = read_placement()
    if placement.world_size == 1:  # else accelerate wraps the model in DDP, which gives other gradients
        for name in SINGLE:
            env.pop(name, None)
    return placement


def tasks_on_node(env: Mapping[str, str]) -> int:
    """Return how many tasks of this Slurm step run on this node; 0 outside of a step.

    `SLURM_STEP_TASKS_PER_NODE` may be 2(x3),1.
    """
    tasks: list[int] = []
    for group in env.get("SLURM_STEP_TASKS_PER_NODE", "0").split(","):
        count, _, times = group.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    return tasks[int(env.get("SLURM_NODEID", "0"))] if any(tasks) else 0


def slurm_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of torch's launchers for a rank that srun started directly; empty for other processes.

    `SLURM_STEP_NODELIST` may be node[01-03,7],x: the first host runs rank 0. The port depends on job, attempt and step.
    So jobs that share a node do not collide, nor does an attempt with one that a lost node left running.
    """
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or "RANK" in env or "WORLD_SIZE" in env:
        return {}
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", env["SLURM_STEP_NODELIST"])
    first_host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else "")
    job, attempt, step = (int(env.get(f"SLURM_{name}") or 0) for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_on_node(env)),
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host,
        "MASTER_PORT": env.get("MASTER_PORT") or str(15000 + (16 * job + 4 * attempt + step) % 15000),
    }


def is_restart() -> bool:
    """Return whether a launcher or Slurm has started this run before, with the same arguments."""
    return any(int(os.environ.get(name) or 0) for name in RESTART_COUNTS)


def run_suffix() -> str:
    """Return what tells this run from others of its recipe.

    It is the id of a sweep, torchrun or Slurm, which all attempts of a run share, or else the time.
    """
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

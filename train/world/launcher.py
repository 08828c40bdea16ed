"""The environment variables of the launchers, from `launch run` to mpirun: a process's place, and its run's identity.

This is the only home of RANK and WORLD_SIZE.
"""

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.cli import run_name
from train.config import Config, TrainConfig
from train.errors import UserError
from train.rundir import find_started, reserve

SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # without a launcher
STEP = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID"]
STEP += ["SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"]
MPI = (  # Open MPI; MPICH and Intel MPI; in the order of SINGLE
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
USE_CPU = "ACCELERATE_USE_CPU"
# What would change the result behind the config's back: {variable: (its values for nothing, what to use instead)}
OFF, MULTI_GPU = ("", "0", "false", "no", "off"), "accelerate's distributed_type: MULTI_GPU"
BENDING = {
    "ACCELERATE_DYNAMO_BACKEND": (OFF, "--train.compile true"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("", "1"), "--train.max_micro_batch_size N"),
    "ACCELERATE_USE_FSDP": (OFF, MULTI_GPU),
    "ACCELERATE_USE_DEEPSPEED": (OFF, MULTI_GPU),
    "ACCELERATE_USE_MEGATRON_LM": (OFF, MULTI_GPU),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (OFF, MULTI_GPU),
    "ACCELERATE_TORCH_DEVICE": (("",), "--train.device"),
    "NVIDIA_TF32_OVERRIDE": (("", "0"), "--train.precision tf32"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (("", "0"), "--train.precision tf32"),
    "ONEDNN_DEFAULT_FPMATH_MODE": (("", "strict"), "--train.precision bf16"),
    "DNNL_DEFAULT_FPMATH_MODE": (("", "strict"), "--train.precision bf16"),
    "PYTORCH_TUNABLEOP_ENABLED": (("", "0"), "the kernels that torch chooses"),
}
RESTART_COUNTS = ("LOCKSTEP_RESTART", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class Placement:
    """The place of this process among all, in torch's words."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_placement() -> Placement:
    """Return the placement that the launcher's environment variables describe, or that of a single process.

    A launcher that sets neither LOCAL_RANK nor LOCAL_WORLD_SIZE starts one rank per machine. Raises UserError if the
    variables are incomplete or contradict each other.
    """
    env = {name: value for name, value in (os.environ | rank_variables(os.environ)).items() if value}
    numbers = [env.get(name, SINGLE[name]) for name in SINGLE]
    place = Placement(*(int(number) if number.isdecimal() else -1 for number in numbers))
    is_whole = ("RANK" in env) == ("WORLD_SIZE" in env)
    is_local_whole = place.world_size == 1 or ("LOCAL_RANK" in env) == ("LOCAL_WORLD_SIZE" in env)
    is_local_valid = 0 <= place.local_rank < place.local_world_size <= place.world_size
    if not (is_whole and is_local_whole and is_local_valid and 0 <= place.rank < place.world_size):
        shown = " ".join(f"{name}={env.get(name, 'unset')}" for name in SINGLE)
        raise UserError(
            f"The launcher's variables are {shown}. Expected RANK below WORLD_SIZE, LOCAL_RANK below LOCAL_WORLD_SIZE, "
            "and both or neither of a pair. Set them, or use torchrun."
        )
    return place


def check_world_size(config: TrainConfig, world_size: int) -> None:
    """Raise UserError if so many ranks cannot share a step."""
    count, size = config.num_micro_batches, config.global_batch_size
    if 0 < count < world_size:
        raise UserError(
            f"{world_size} processes cannot share train.num_micro_batches {count}. Use at most {count} processes, or "
            f"--train.num_micro_batches {2 ** (world_size - 1).bit_length()} (another run: it changes the result)."
        )
    if size < world_size:
        raise UserError(f"train.global_batch_size is {size}, fewer than {world_size} ranks. Use {world_size} or more.")


def is_local_rank_given() -> bool:
    """Return whether the launcher told this rank which ones share its machine."""
    return "LOCAL_WORLD_SIZE" in os.environ


def store_address() -> tuple[str, int]:
    """Return the host and port on which rank 0 serves the store of the process group. Raises UserError without them."""
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"MASTER_ADDR is {host or 'unset'} and MASTER_PORT is {port or 'unset'}. Expected the name of rank 0's "
            "machine and a free port there. Set both for every rank (mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500)."
        )
    return host, int(port)


def is_cpu_required(env: Mapping[str, str]) -> bool:
    """Return whether accelerate's variables ask for the CPU."""
    return env.get(USE_CPU, "").lower() in ("1", "true", "yes", "on", "y", "t")


def check_environment(precision: str, env: Mapping[str, str]) -> str | None:
    """Return a warning if accelerate's variables ask for another precision, which they do not change.

    Raises UserError if a variable asks for anything else that would change the result.
    """
    for name, (nothing, instead) in BENDING.items():
        if (value := env.get(name, "")).lower() not in nothing:
            raise UserError(
                f"{name} is {value}: it would change the result. Remove it from the environment or accelerate's "
                f"config file, and use {instead}."
            )
    asked = env.get("ACCELERATE_MIXED_PRECISION") or "no"
    if asked not in ("no", "bf16", "fp16"):
        raise UserError(f"accelerate launch asks for mixed precision {asked}. Use no, bf16 or fp16.")
    if asked in ("no", precision):
        return None
    return (
        f"warning: accelerate launch asks for mixed precision {asked}, train.precision is {precision}: {precision} is "
        f"used, because the config alone decides the result. Set --train.precision {asked} to change it."
    )


def accept_placement(config: TrainConfig) -> Placement:
    """Return the placement, and set the environment variables that torch and accelerate read to match it.

    Raises UserError if accelerate would silently start another world size, or compute something else.
    """
    env = os.environ
    env.update(rank_variables(env))
    if "WORLD_SIZE" not in env and "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as its CPU launcher does. "
            "Use `accelerate launch --multi_gpu --num_processes N` with ACCELERATE_USE_CPU=1, "
            "or `torchrun --nproc-per-node N`."
        )
    placement = read_placement()
    warning = check_environment(config.precision, env)
    if warning and placement.rank == 0:
        print(warning, flush=True)
    for name in [name for name in env if name.startswith("ACCELERATE_") and name != USE_CPU]:
        del env[name]  # what is left has no effect
    if USE_CPU in env:
        env[USE_CPU] = str(is_cpu_required(env)).lower()  # accelerate refuses other words
    if placement.world_size == 1:  # else accelerate wraps the model in DDP, which gives other gradients
        for name in SINGLE:
            env.pop(name, None)
    else:
        env.setdefault("LOCAL_RANK", "0")  # for accelerate
    return placement


def rank_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of torch's launchers that `env` lacks, for a rank that mpirun or srun started.

    Scripts for Slurm, and enroot's hook, set all but LOCAL_WORLD_SIZE. mpirun comes first: in a Slurm job it uses srun.
    """
    if env.keys() >= SINGLE.keys():
        return {}
    for names in MPI:
        if env.keys() >= set(names):
            found = {own: env[name] for own, name in zip(SINGLE, names, strict=True)}
            break
    else:
        found = slurm_variables(env)
        sizes = [f"{names[1]} {env[names[1]]}" for names in MPI if env.get(names[1], "1") != "1"]
        if sizes and not found and "RANK" not in env:
            raise UserError(
                f"The launcher sets {sizes[0]}, but not all that it needs. Set {', '.join(SINGLE)} per rank."
            )
    return {name: value for name, value in found.items() if not env.get(name)}


def expand_counts(text: str) -> list[int]:
    """Return the numbers that Slurm abbreviates: 2(x3),1 is [2, 2, 2, 1]."""
    counts: list[int] = []
    for group in text.split(","):
        count, _, times = group.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def tasks_on_node(env: Mapping[str, str]) -> int:
    """Return how many tasks of this Slurm step run on this node; 0 outside of a step, or if that is unknown."""
    try:
        return dict(enumerate(expand_counts(env["SLURM_STEP_TASKS_PER_NODE"])))[int(env["SLURM_NODEID"])]
    except (KeyError, ValueError):
        return 0


def is_at_prompt(env: Mapping[str, str]) -> bool:
    """Return whether this process was started by hand in the shell of `srun --pty`, which is one task of a step.

    The other tasks of that step are shells that have ended. The steps that `srun` starts from such a shell inherit its
    variables, but their tasks have no terminal.
    """
    task = env.get("SLURM_TASK_PID")
    if "SLURM_PTY_PORT" not in env or task == str(os.getpid()):
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return task is None
    return True


def slurm_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of torch's launchers for a rank that srun started directly; empty for other processes.

    `SLURM_STEP_NODELIST` may be node[01-03,7],x: the first host runs rank 0. The port depends on job, attempt and step,
    or on slurm/train.sbatch's count of attempts. So jobs that share a node do not collide, nor does an attempt with one
    that a lost node left running. Raises UserError if the variables describe no task.
    """
    if env.get("SLURM_STEP_NUM_TASKS", "1") == "1" or is_at_prompt(env):
        return {}
    try:
        first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", env["SLURM_STEP_NODELIST"])
        first_host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else "")
        job, attempt, step = (int(env.get(f"SLURM_{name}") or 0) for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
        offset = int(env.get("LOCKSTEP_RESTART") or 4 * attempt + step)
        rank, world_size, local_rank = (int(env[name]) for name in STEP[:3])
        if not (first_host and 0 <= rank < world_size and 0 <= local_rank < tasks_on_node(env)):
            raise ValueError
    except (KeyError, ValueError):
        found = ", ".join(f"{name} {env.get(name, 'is not set')}" for name in STEP)
        remedy = "Start with `srun python -m train`, or `unset SLURM_STEP_NUM_TASKS` to train alone"
        raise UserError(f"Slurm's variables do not describe a task of a step: {found}. {remedy}.") from None
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(tasks_on_node(env)),
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host,
        "MASTER_PORT": env.get("MASTER_PORT") or str(15000 + (16 * job + offset) % 15000),
    }


def is_slurm_task(env: Mapping[str, str], local_rank: int, local_world_size: int) -> bool:
    """Return whether the ranks of this machine are the tasks of a Slurm step, not processes inside of a task."""
    return env.get("SLURM_LOCALID") == str(local_rank) and tasks_on_node(env) == local_world_size


def read_count(name: str) -> int:
    """Return the number that a launcher has put into a variable, or 0. Raises UserError if it is none."""
    value = os.environ.get(name) or "0"
    if not value.isdecimal():
        raise UserError(f"The launcher's {name} is {value}, expected a number.")
    return int(value)


def is_restart() -> bool:
    """Return whether a launcher or Slurm has started this run before, with the same arguments."""
    return any(read_count(name) for name in RESTART_COUNTS)


def choose_name(config: Config, argv: Sequence[str]) -> str:
    """Return run.name, or an automatic name: one that a launcher's restart finds again, but no other start.

    The suffix is an id of a sweep, torchrun or Slurm, or the time. A user gives torchrun's id to name a run. The other
    ids may be older than this start: a notebook may run in a Slurm step. So they get a new directory, unless a launcher
    restarts the run.
    """
    if config.run.name:
        return config.run.name
    identity = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
        suffix = os.environ["WANDB_RUN_ID"]
    elif identity != "none":
        return run_name(config, argv, identity)
    elif "SLURM_STEP_ID" in os.environ and not is_at_prompt(os.environ):
        suffix = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ['SLURM_STEP_ID']}"  # the same after a requeue
    elif read_count("TORCHELASTIC_MAX_RESTARTS") > 0:
        raise UserError(
            "torchrun --max-restarts needs --run.name (or its --rdzv-id): a restart must find the same run."
        )
    else:
        suffix = time.strftime("%Y%m%d-%H%M%S")
    place, name = Path(config.run.dir), run_name(config, argv, suffix)
    return (is_restart() and find_started(place, name, argv)) or reserve(place, name)

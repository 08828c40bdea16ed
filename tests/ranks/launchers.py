"""Make a rank look as if another launcher had started it. ranks.processes has set torch's variables."""

import os
import socket

from train.world import world

OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def renamed(*names: str) -> None:
    for own, name in zip(OWN, names, strict=True):
        os.environ[name] = os.environ.pop(own)


def open_mpi() -> None:
    renamed(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))


def mpich() -> None:
    renamed("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def open_mpi_in_a_slurm_job() -> None:
    """srun started one daemon on each of two nodes, and these started the ranks."""
    open_mpi()
    os.environ |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}


def without_local_rank() -> None:
    del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]


def pytorchjob() -> None:
    """Each pod has its own host name."""
    without_local_rank()
    pod = f"pod-{os.environ['RANK']}"
    socket.gethostname = lambda: pod


def slurm_script() -> None:
    """A script in which RANK is SLURM_PROCID, and so on."""
    place = {"PROCID": os.environ["RANK"], "LOCALID": os.environ["LOCAL_RANK"], "NODEID": "0"}
    step = {"STEP_NUM_TASKS": "2", "STEP_TASKS_PER_NODE": "2", "STEP_NODELIST": "localhost"}
    os.environ |= {f"SLURM_{name}": value for name, value in (place | step).items()}
    del os.environ["LOCAL_WORLD_SIZE"]


def impatient() -> None:
    """A rank waits for the others for `train.timeout` alone."""
    world.START_TIMEOUT_SECONDS = world.BACKSTOP_SECONDS = 0

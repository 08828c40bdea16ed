"""Each rank chooses the right device on machines with other GPUs than this one. torch's report of GPUs is mocked."""

import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from train.config import TrainConfig
from train.errors import UserError
from train.world.device import choose_backend, choose_device, set_arithmetic
from train.world.launcher import Placement, slurm_variables, tasks_on_node
from train.world.world import World, join

REFUSED = None
GPU = torch.device("cuda", 0)
Launcher = Literal["launch run", "torchrun", "accelerate", "torchrun in a task", "srun", "srun, bound"]


def tf32() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo after the test what World.open sets in torch and in the environment."""
    for name in ("RANK", "ACCELERATE_BYPASS_DEVICE_MAP"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    yield
    set_arithmetic(is_exact=False, is_tf32=False)


def show(monkeypatch: pytest.MonkeyPatch, num_gpus: int, capability: tuple[int, int] = (9, 0)) -> None:
    """Make torch see this many GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def environment(launcher: Launcher, local_rank: int, ranks: int, gpus: int) -> dict[str, str]:
    """Return the environment variables of a rank on a node with `gpus` allocated GPUs."""
    if launcher in ("launch run", "torchrun", "accelerate"):
        return {}
    tasks, task = (1, 0) if launcher == "torchrun in a task" else (ranks, local_rank)
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_NODEID": "1",
        "SLURM_PROCID": str(tasks + task),
        "SLURM_LOCALID": str(task),
        "SLURM_STEP_NUM_TASKS": str(2 * tasks),
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)",
        "SLURM_GPUS_ON_NODE": str(gpus),
    }


# (allocated GPUs, ranks of the node) -> each rank's device, or REFUSED
SHARED = {
    (1, 1): [0],
    (1, 2): REFUSED,
    (1, 8): REFUSED,
    (2, 1): [0],
    (2, 2): [0, 1],
    (2, 8): REFUSED,
    (8, 1): [0],
    (8, 2): [0, 1],
    (8, 8): [0, 1, 2, 3, 4, 5, 6, 7],
}
# the same GPUs, bound to tasks by srun: a rank numbers its own from 0
BOUND = {place: chosen and [0] * len(chosen) for place, chosen in SHARED.items()}


@pytest.mark.parametrize(
    "launcher", ["launch run", "torchrun", "accelerate", "torchrun in a task", "srun", "srun, bound"]
)
@pytest.mark.parametrize(("gpus", "ranks"), SHARED)
def test_every_rank_chooses_a_gpu_of_its_own_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, gpus: int, ranks: int
) -> None:
    is_bound = launcher == "srun, bound"
    show(monkeypatch, max(1, gpus // ranks) if is_bound else gpus)
    for local_rank in range(ranks):
        with monkeypatch.context() as patch:
            for name, value in environment(launcher, local_rank, ranks, gpus).items():
                patch.setenv(name, value)
            expected = (BOUND if is_bound else SHARED)[gpus, ranks]
            if expected is REFUSED:
                message = (
                    f"{ranks} processes on this machine, but {gpus} GPU.s.. Start {gpus}, or use --train.device cpu."
                )
                with pytest.raises(UserError, match=message):
                    choose_device(TrainConfig(), local_rank, ranks)
            else:
                chosen = choose_device(TrainConfig(), local_rank, ranks)
                # a rank that is bound to several uses one of them
                assert chosen.index == (local_rank % (gpus // ranks) if is_bound else expected[local_rank])


def test_a_bound_task_is_not_refused_where_slurm_does_not_count_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch, 1)
    for name, value in environment("srun", 1, 2, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert choose_device(TrainConfig(), 1, 2) == GPU


@pytest.mark.parametrize(
    ("text", "node", "tasks"), [("2(x3),1", "2", 2), ("2(x3),1", "3", 1), ("4", "0", 4), ("", "0", 0), ("x", "0", 0)]
)
def test_tasks_of_a_node(text: str, node: str, tasks: int) -> None:
    assert tasks_on_node({"SLURM_STEP_TASKS_PER_NODE": text or "0", "SLURM_NODEID": node}) == tasks
    assert tasks_on_node({}) == 0


@pytest.mark.parametrize(
    ("launcher", "visible", "share", "device", "device_ids"),
    [
        ("torchrun", 2, None, 1, [1]),
        ("srun", 2, None, 1, [1]),
        ("srun, bound", 1, None, 0, None),  # the only GPU that this rank sees: it has no [1]
        ("torchrun", 1, "gloo", 0, None),
    ],
)
def test_ddp_gets_the_device_that_the_rank_has_chosen(
    monkeypatch: pytest.MonkeyPatch,
    launcher: Launcher,
    visible: int,
    share: str | None,
    device: int,
    device_ids: list[int] | None,
) -> None:
    show(monkeypatch, visible)
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (
        environment(launcher, 1, 2, 2) | place | ({"LOCKSTEP_SHARE_GPU": share} if share else {})
    ).items():
        monkeypatch.setenv(name, value)
    given: list[Any] = []
    join = dist.init_process_group

    def init_process_group(backend: str, **options: Any) -> None:
        assert backend == (share or "nccl")
        join("fake", rank=1, world_size=2, store=FakeStore())

    def ddp(model: nn.Module, device_ids: list[int] | None = None, **options: Any) -> nn.Module:
        given.append(device_ids)
        return model

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", ddp)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    world = World.open(TrainConfig())
    try:
        assert world.device == torch.device("cuda", device)
        model = nn.Linear(1, 1)
        world.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        assert given == [device_ids]
    finally:
        world.close()


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_emulated_precision_is_refused(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    show(monkeypatch, 1, capability=(7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match=f"This GPU has no native {precision}. Use train.precision fp16 or fp32."):
        choose_device(TrainConfig(precision=precision), 0, 1)
    assert choose_device(TrainConfig(precision="fp16"), 0, 1) == GPU
    show(monkeypatch, 1, capability=(8, 0))
    assert choose_device(TrainConfig(precision=precision), 0, 1) == GPU


def test_tf32_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch, 0)
    with pytest.raises(UserError, match=r"train.precision tf32 needs a GPU"):
        choose_device(TrainConfig(precision="tf32"), 0, 1)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", False), ("bf16", False), ("tf32", True)])
def test_tf32_is_on_while_a_world_of_that_precision_is_open(
    monkeypatch: pytest.MonkeyPatch, precision: Any, expected: bool
) -> None:
    monkeypatch.setattr("train.world.world.choose_device", lambda *arguments: torch.device("cpu"))
    cpu = torch.backends.mkldnn
    for before in (True, False):
        set_arithmetic(is_exact=False, is_tf32=before)
        cpu_before = cpu.matmul.fp32_precision, cpu.conv.fp32_precision
        world = World.open(TrainConfig(precision=precision))
        try:
            assert tf32() == (expected, expected)
            newer = (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
            assert ["tf32" in setting for setting in newer] == [expected, expected]
            assert (cpu.matmul.fp32_precision, cpu.conv.fp32_precision) == cpu_before
            assert world.accelerator.mixed_precision == ("bf16" if precision == "bf16" else "no")
        finally:
            world.close()
        assert tf32() == (False, False)


def test_setting_tf32_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_arithmetic(is_exact=False, is_tf32=True)
        assert tf32() == (True, True)


@pytest.mark.parametrize(("share", "backend"), [(None, "nccl"), ("nccl", "nccl"), ("gloo", "gloo")])
def test_backend_of_ranks_that_share_a_gpu_is_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch, share: str | None, backend: str
) -> None:
    show(monkeypatch, 1)
    if share:
        monkeypatch.setenv("LOCKSTEP_SHARE_GPU", share)
        assert [choose_device(TrainConfig(), rank, 4) for rank in range(4)] == [GPU] * 4
    assert choose_backend(GPU) == backend
    assert choose_backend(torch.device("cpu")) == "gloo"
    started: list[str] = []
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: started.append(name))
    join(GPU, Placement(1, 4, 1, 4), timedelta(seconds=1))
    assert started == [backend]


def test_local_world_size_of_a_task_is_the_tasks_of_its_node() -> None:
    assert slurm_variables(environment("srun", 1, 4, 4))["LOCAL_WORLD_SIZE"] == "4"

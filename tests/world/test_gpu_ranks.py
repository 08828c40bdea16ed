"""Ranks on GPUs do the right thing. No GPU is needed: devices, events and packages are fakes."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config

from train.config import TrainConfig
from train.tracking.summary import PACKAGES
from train.world import reduce, world
from train.world.clock import Clock, DeviceMeter, Record
from train.world.environment import environment, environment_differences, versions
from train.world.watchdog import Verdict, judge
from train.world.world import World

GPU = torch.device("cuda", 1)


def on_gpus(opened: World) -> World:
    """Return the world of rank 1 of two on GPUs."""
    return dataclasses.replace(opened, rank=1, world_size=2, device=GPU, clock=Clock())


# The exact tree


def test_exact_tree_sends_no_tensor_of_a_gpu_through_gloo(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_perfect(opened: World, backend: str) -> bool:
        monkeypatch.setattr(reduce.dist, "get_backend", lambda: backend)
        return reduce.ExactTree(torch.nn.Linear(2, 2), opened, 4, [range(2), range(2, 4)]).is_perfect

    assert is_perfect(on_gpus(world), "nccl")
    assert not is_perfect(on_gpus(world), "gloo")
    assert is_perfect(dataclasses.replace(world, world_size=2), "gloo")


# Which rank the watchdog blames


def record_in_wait(ranks: World, monkeypatch: pytest.MonkeyPatch, rank: int, phase: str) -> Record:
    """Return the record of a rank that waits for its device, as other ranks would read it."""
    found: list[Record] = []
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: found.append(Record.unpack(rank, bytes(ranks.clock.record)))
    )
    ranks.clock.enter(phase)
    ranks.wait()
    assert ranks.clock.phase == phase
    return found[0]


@pytest.mark.parametrize("phase", ["log", "evaluate", "save"])
def test_ranks_that_wait_for_their_devices_blame_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Two hosts read the result of a collective that hangs on the devices. Neither rank is at fault."""
    ranks = [on_gpus(world), on_gpus(world)]
    for each in ranks:
        each.clock.step = 20
        each.clock.announce()
    records = [record_in_wait(each, monkeypatch, rank, phase) for rank, each in enumerate(ranks)]
    now = time.time()
    assert judge(records, 2, now) == Verdict([], "all ranks wait in collective 1 of step 20 for 0 s")
    unmarked = [dataclasses.replace(record, phase=phase) for record in records]
    assert judge(unmarked, 2, now).culprits == unmarked  # as if both were busy


@pytest.mark.parametrize("phase", ["data", "forward_backward"])
def test_rank_that_is_behind_on_the_host_is_blamed_by_one_that_waits_for_its_device(
    world: World, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    ahead, behind = on_gpus(world), Clock()
    for clock in (ahead.clock, behind):
        clock.step = 12
        clock.announce()
    behind.enter(phase)
    ahead.clock.step = 20  # its host ran ahead
    for _ in range(16):
        ahead.clock.announce()
    waiting, stuck = record_in_wait(ahead, monkeypatch, 0, "log"), Record.unpack(1, bytes(behind.record))
    verdict = judge([waiting, stuck], 2, time.time())
    assert verdict.culprits == [stuck]
    assert f"did not reach collective 17 of step 20: it is in {phase}" in verdict.line


def test_only_one_of_several_gpus_waits_in_reduce_and_a_cpu_does_not_wait(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record_in_wait(dataclasses.replace(on_gpus(world), world_size=1), monkeypatch, 0, "log").phase == "log"
    assert record_in_wait(on_gpus(world), monkeypatch, 0, "log").phase == "reduce"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("waits"))
    dataclasses.replace(world, world_size=2).wait()


class Read:
    """A tensor that records the phase in which the host reads its numbers."""

    def __init__(self, clock: Clock, value: int) -> None:
        self.clock, self.value, self.phases = clock, value, []  # type: ignore[var-annotated]

    def __int__(self) -> int:
        self.phases.append(self.clock.phase)
        return self.value

    def cpu(self) -> torch.Tensor:
        self.phases.append(self.clock.phase)
        return torch.zeros(self.value, dtype=torch.uint8)

    def to(self, device: torch.device) -> "Read":
        return self

    def copy_(self, source: "Read") -> None:
        self.phases.append(self.clock.phase)


def test_results_of_collectives_are_read_in_reduce(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = dataclasses.replace(world, rank=1, world_size=2, clock=Clock())
    number, content, values = (Read(ranks.clock, 2) for _ in range(3))
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, lambda *_: None)
    monkeypatch.setattr(torch, "tensor", lambda *_, **options: number)
    monkeypatch.setattr(torch, "empty", lambda *_, **options: content)
    ranks.all_reduce_sum_(values)  # type: ignore[arg-type]
    assert values.phases == ["reduce"]
    assert ranks.broadcast_bytes(b"") == b"\0\0"
    assert {*number.phases, *content.phases} == {"reduce"}
    assert content.phases


# Own work, measured on the device


class Device:
    """A device that has done `done` of the queued milliseconds of work."""

    def __init__(self) -> None:
        self.queued, self.done = 0.0, -1.0

    def work(self, milliseconds: float) -> None:
        self.queued += milliseconds

    def record(self) -> SimpleNamespace:
        at = self.queued
        return SimpleNamespace(at=at, query=lambda: self.done >= at, elapsed_time=lambda end: end.at - at)


def step(clock: Clock, device: Device, own: float, wait: float) -> float:
    """Mark one step as train_step does; return the seconds of own work since the last one."""
    clock.enter("data")
    clock.enter("forward_backward")
    device.work(own)
    clock.enter("reduce")
    device.work(wait)
    clock.enter("forward_backward")
    clock.enter("optimizer")
    seconds = clock.take_lap()
    with clock.collective():
        device.work(wait)
    device.work(1.0)
    clock.enter("log")
    device.work(100.0)  # an evaluation
    return seconds


def test_own_work_is_the_seconds_of_the_device_without_waiting_and_comes_late() -> None:
    device = Device()
    clock = Clock(DeviceMeter(device.record))
    laps = [step(clock, device, 5.0, 40.0) for _ in range(2)]
    device.done = device.queued
    laps += [step(clock, device, 9.0, 40.0) for _ in range(2)]
    device.done = device.queued
    laps.append(step(clock, device, 9.0, 40.0))
    # the last millisecond of a step counts in the next one; unknown, unknown, the mean of 2, nothing new, the mean of 2
    assert laps == pytest.approx([0.0, 0.0, 0.0055, 0.0055, 0.010])
    assert clock.seconds["forward_backward"] < 0.1  # phases stay the host's


def test_seconds_of_a_warm_up_are_forgotten() -> None:
    """The first steps, whose own seconds are not known yet, would report them and name a rank that is not slow."""
    device = Device()
    clock = Clock(DeviceMeter(device.record))
    step(clock, device, 3000.0, 40.0)
    device.done = device.queued
    clock.forget()
    assert [step(clock, device, 5.0, 40.0) for _ in range(2)] == [0.0, 0.0]
    device.done = device.queued
    assert step(clock, device, 5.0, 40.0) == pytest.approx(0.0055)


def test_clock_without_a_meter_measures_the_host() -> None:
    clock = Clock()
    clock.enter("data")
    time.sleep(0.01)
    assert clock.take_lap() >= 0.01


@pytest.fixture
def opened_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Open a world with fake ranks and a fake device."""

    def open_world(world_size: int, device: torch.device, config: TrainConfig) -> World:
        found = SimpleNamespace(process_index=0, local_process_index=0, num_processes=world_size, device=device)
        monkeypatch.setattr(world, "choose_device", lambda *_: device)
        monkeypatch.setattr(world, "join", lambda *_: None)
        monkeypatch.setattr(world, "make_accelerator", lambda *_: found)
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, "0")
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, str(world_size))
        return World.open(config)

    threads = torch.get_num_threads()
    yield open_world
    torch.set_num_threads(threads)


def test_several_gpus_have_a_meter(opened_on: Any) -> None:
    assert isinstance(opened_on(2, GPU, TrainConfig()).clock.meter, DeviceMeter)
    assert opened_on(1, GPU, TrainConfig()).clock.meter is None
    assert opened_on(2, torch.device("cpu"), TrainConfig()).clock.meter is None


# Exact mode's switches, and what must stay the same


def test_exact_mode_switches_on_and_off_what_it_needs(opened_on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    deterministic: Any = torch.utils.deterministic
    exact = opened_on(1, torch.device("cpu"), TrainConfig(exact=True, num_micro_batches=2, compile=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch._inductor.config.deterministic  # else Inductor chooses kernels by how long they take
    assert not deterministic.fill_uninitialized_memory
    exact.close()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch._inductor.config.deterministic
    assert deterministic.fill_uninitialized_memory
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: pytest.fail("imports Inductor's config"))
    opened_on(1, torch.device("cpu"), TrainConfig()).close()


def test_environment_fingerprint_names_cuda_and_cudnn_on_a_gpu(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    found = environment(on_gpus(world))
    assert found["versions"].items() >= {"cuda": "13.0", "cudnn": 91900}.items()
    assert found["versions"].keys() == {"torch", "torchvision", "accelerate", "cuda", "cudnn"}
    assert (found["device"], found["num_threads"]) == ("H100", None)
    assert environment(world)["versions"].keys() == {"torch", "torchvision", "accelerate"}
    old = {**found, "versions": {"torch": found["versions"]["torch"]}}
    assert environment_differences(old, found) == environment_differences(found, old) == []  # it was not recorded
    other = {**found, "versions": found["versions"] | {"cudnn": 92000}}
    assert environment_differences(found, other) == ["cudnn 91900 -> 92000"]


def test_packages_without_metadata_are_left_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("wandb", "lockstep", "accelerate"):
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr("train.world.environment.version", version)
    assert versions(*PACKAGES, "lockstep").keys() == {"torch", "torchvision", "numpy", "safetensors", "lockstep"}
    assert environment(world)["versions"].keys() == {"torch", "torchvision"}

"""Every step does the same work on one device and waits for nothing, so that CUDA graphs can record it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from in_process import Run
from ranks.processes import train
from torch.utils._python_dispatch import TorchDispatchMode

from train.cli import parse
from train.functional import optim
from train.state import Plan, State
from train.step import train_step
from train.storage import checkpoint
from train.warmup import warm_up
from train.world import graphs
from train.world.world import World

FLAGS = (
    "--data.name digits --train.device cpu --train.num_threads 1 --train.global_batch_size 128 --wandb.mode disabled"
)
ALL = (
    "--model.name tiny_bn --model.dropout 0.3 --train.num_micro_batches 2 --augment.shift 2 --augment.rotate 10 "
    "--augment.erase 0.5 --optim.ema 0.9 --optim.clip_norm 1 --optim.label_smoothing 0.1"
)
MODES = ["--train.precision bf16", "--train.exact true"]


def opened(world: World, flags: str) -> Run:
    return Run.open(parse(f"{FLAGS} {flags}".split()), world)


class Seen(TorchDispatchMode):
    """Record each operation with the shapes of its tensors and every other argument."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = torch.utils._pytree.tree_leaves((args, kwargs))
        shown = [tuple(each.shape) if isinstance(each, torch.Tensor) else repr(each) for each in arguments]
        if not str(func).startswith("profiler."):  # the optimizer names itself to a profiler
            self.operations.append((str(func), *shown))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("mode", MODES)
def test_device_work_is_the_same_in_every_step_and_waits_for_nothing(world: World, name: str, mode: str) -> None:
    """A graph repeats each operation with the arguments of the recorded step, so none may depend on that step."""
    run = opened(world, f"{ALL} {mode} --optim.name {name}")
    run.plan.tables.keep_lr_on_device(run.state.optimizer)  # as on a GPU
    seen: list[list[tuple[Any, ...]]] = []

    def watch(plan: Plan, state: State) -> None:
        with Seen() as mode:
            train_step(plan, state)
        seen.append(mode.operations)

    run.take_step = watch
    run.steps(5)
    first, *others = seen[1:]  # the first step makes the optimizer's state
    assert others == [first] * 3
    operations = {operation[0] for operation in first}
    assert len(operations) > 20
    # a host-device sync, or a shape that depends on values
    assert not operations & {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}


@pytest.mark.sample(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_replayed_steps_are_the_ordinary_ones(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    """A replay gets nothing from the host and computes the recorded step. What differs must come from the tables."""
    flags = f"{ALL} {mode} --optim.name {name} --train.epochs 2"
    ordinary, replayed = opened(world, flags), opened(world, flags)
    for run in (ordinary, replayed):
        run.plan.tables.keep_lr_on_device(run.state.optimizer)
    replays = [0]

    def record(work: Any) -> Any:
        def replay() -> None:
            replays[0] += 1
            work()

        return replay

    monkeypatch.setattr(graphs, "record", record)
    replayed.plan = dataclasses.replace(replayed.plan, should_record=True)
    replayed.take_step = warm_up(replayed.plan, replayed.state, pytest.fail)
    results = []
    for run in (ordinary, replayed):
        results.append([])
        for step in range(run.plan.total_steps):
            run.steps()
            results[-1] += run.plan.tables.read_results(step, step + 1)
    assert results[0] == results[1]
    assert ordinary.sha256() == replayed.sha256()
    sampler = ordinary.plan.sampler
    assert sampler.batch_rows(sampler.steps_per_epoch - 1) < 128  # an epoch's last batch is no graph's
    assert replays[0] == ordinary.plan.total_steps - 2


def test_a_recording_that_fails_costs_a_warning_and_not_the_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = f"{ALL} --train.exact true"
    ordinary, given_up = opened(world, flags), opened(world, flags)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("operation not\npermitted")

    def record(work: Any) -> None:
        with monkeypatch.context() as patch:  # halfway: gradients and the tree's sums are left behind
            patch.setattr(optim, "align_gradients", fail)
            try:
                work()
            except RuntimeError:
                raise RuntimeError("the capture failed")  # noqa: B904  as torch.cuda.graph does at its end, without the reason

    monkeypatch.setattr(graphs, "record", record)
    plan = dataclasses.replace(given_up.plan, should_record=True)
    lines: list[str] = []
    assert warm_up(plan, given_up.state, lines.append) is train_step
    assert len(lines) == 1
    assert "warning: the step cannot be recorded as a CUDA graph: operation not permitted." in lines[0]
    for run in (ordinary, given_up):
        run.steps(3)
    assert ordinary.sha256() == given_up.sha256()


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "flags", [f"{ALL} --train.exact true", f"{ALL} --optim.name adamw", "--optim.momentum 0 --model.name tiny"]
)
@pytest.mark.parametrize(
    "before", [0, 3, 11]
)  # a fresh run, a resumed one, and one whose next batch is an epoch's last
def test_warm_up_leaves_no_trace(world: World, flags: str, before: int) -> None:
    cold, warm = opened(world, f"{flags} --train.epochs 2"), opened(world, f"{flags} --train.epochs 2")
    for run in (cold, warm):
        run.steps(before)
    counted = (warm.state.ledger.count, warm.state.step)
    warm_up(warm.plan, warm.state, pytest.fail)
    assert (warm.state.ledger.count, warm.state.step) == counted
    assert warm.state.timing.warm_up_seconds > 0
    states = []
    for run in (cold, warm):
        run.steps(15 - before)
        tensors = {
            f"{name}/{key}": value
            for name, each in run.state.modules.items()
            for key, value in each.state_dict().items()
        }
        optimizer = checkpoint.optimizer_tensors(run.state.optimizer.optimizer, run.state.module)
        hashes = [checkpoint.tensors_sha256(each) for each in (tensors, optimizer)]
        states.append((hashes, run.plan.tables.read_results(12, 15)))
    assert states[0] == states[1]


def test_warm_up_is_not_training_time_and_is_in_the_summary(tmp_path: Path) -> None:
    flags = "--train.max_steps 4 --model.name tiny"
    summary = train(1, tmp_path / "run", flags, MUTANT="accidents.slow_first_call")
    assert summary["train_seconds"] < 3 <= summary["warm_up_seconds"]
    assert summary["images_per_second"] > 4 * 64 / 3


def test_lr_of_the_tables_is_that_of_the_step(world: World) -> None:
    found = []
    for on_device in (False, True):
        run = opened(world, "--model.name tiny --train.epochs 2")
        if on_device:
            run.plan.tables.keep_lr_on_device(run.state.optimizer)
        found.append([])
        for _ in range(run.plan.total_steps):
            run.steps()
            found[-1].append([float(group["lr"]) for group in run.state.optimizer.param_groups])
    total_steps = run.plan.total_steps
    assert found[0] == [[optim.lr(run.plan.config.optim, step, total_steps)] * 2 for step in range(total_steps)]
    assert found[1] == [[float(torch.tensor(lr)) for lr in lrs] for lrs in found[0]]


@pytest.mark.parametrize("asked", ["auto", "on", "off"])
def test_graphs_change_nothing_without_a_gpu_and_the_headline_reports_it(tmp_path: Path, asked: str) -> None:
    flags = "--train.max_steps 6 --train.device cpu"
    plain, other = (
        train(1, tmp_path / "plain", flags),
        train(1, tmp_path / "run", flags, f"--train.cuda_graphs {asked}"),
    )
    assert plain["weights_sha256"] == other["weights_sha256"]
    headline = (tmp_path / "run-logs" / "rank-0.log").read_text().splitlines()[0]
    assert headline.endswith("fp32, no CUDA graph (no GPU)" if asked == "on" else "fp32")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
@pytest.mark.parametrize("mode", ["fp32", "tf32", "bf16", "bf16 --train.compile true"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_graphs_have_the_bits_of_a_step_kernel_by_kernel(tmp_path: Path, mode: str, name: str) -> None:
    flags = (
        ALL,
        f"--train.exact true --train.precision {mode}",
        f"--train.device cuda --optim.name {name} --optim.lr 0.01",
    )
    flags += ("--train.epochs 3",)
    plain, graphed = (train(1, tmp_path / each, *flags, f"--train.cuda_graphs {each}") for each in ("off", "on"))
    assert plain["weights_sha256"] == graphed["weights_sha256"]
    assert "CUDA graph" in (tmp_path / "on-logs" / "rank-0.log").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
@pytest.mark.parametrize("network", ["resnet18", "vit"])
def test_networks_from_a_file_have_the_same_bits_with_and_without_a_graph(tmp_path: Path, network: str) -> None:
    own = f"--model.name {ROOT}/configs/networks/{network}.py:build --model.dropout 0"
    flags = (own, "--train.exact true --train.num_micro_batches 4 --train.device cuda --train.max_steps 12")
    plain, graphed = (train(1, tmp_path / each, *flags, f"--train.cuda_graphs {each}") for each in ("off", "on"))
    assert plain["weights_sha256"] == graphed["weights_sha256"]
    assert "CUDA graph" in (tmp_path / "on-logs" / "rank-0.log").read_text()

"""CUDA graphs: on a CPU, that a step's device work may be recorded; on a GPU, that it is, with the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks.processes import train
from torch.utils._python_dispatch import TorchDispatchMode

from train import checkpoint, data, graphs, optim, step
from train.cli import parse
from train.graphs import Graphs, Recording
from train.run import Run, set_up
from train.step import train_step
from train.world import World

FLAGS = "--data.name digits --train.device cpu --train.num_threads 1 --train.global_batch_size 128 --wandb.mode disabled"
ALL = (
    "--model.name tiny_bn --model.dropout 0.3 --train.micro_batches 2 --augment.shift 2 --augment.rotate 10 --augment.erase 0.5 "
    "--optim.ema 0.9 --optim.clip_norm 1 --optim.label_smoothing 0.1"
)


def opened(world: World, flags: str) -> Run:
    config = parse(f"{FLAGS} {flags}".split())
    return set_up(config, world, data.load(config.data, world))


class Seen(TorchDispatchMode):
    """Writes down each operation with the shapes of its tensors and every other argument."""

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
@pytest.mark.parametrize("mode", ["--train.precision bf16", "--train.exact true"])
def test_device_work_is_the_same_in_every_step_and_waits_for_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    """A graph repeats each operation with the arguments of the step that was recorded: none may hold a number of that step."""
    run = opened(world, f"{ALL} {mode} --optim.name {name}")
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(0.1)  # as on a GPU
    seen: dict[str, list[list[tuple[Any, ...]]]] = {"_gradients": [], "_update": []}

    def watch(work: Any, state: Run, *inputs: torch.Tensor) -> Any:
        with Seen() as mode:
            outputs = work(state, *inputs)
        seen[work.__name__].append(mode.operations)
        return outputs

    monkeypatch.setattr(step, "_call", watch)
    for _ in range(5):
        train_step(run)
    for second, *others in (found[1:] for found in seen.values()):  # the first step makes the optimizer's state
        assert others == [second] * 3
        operations = {operation[0] for operation in second}
        assert len(operations) > 10
        # a host-device sync, or a shape that depends on values
        assert not operations & {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}


def record_by_calling(work: Any, state: Any, inputs: list[torch.Tensor], pool: Any) -> Recording:
    """What `graphs.record` makes, without a GPU: a replay that computes, into outputs that stay where they are."""
    outputs: Any = []

    def replay() -> None:
        for number, new in enumerate(work(state, *inputs)):
            outputs[number : number + 1] = [outputs[number].copy_(new) if number < len(outputs) else new.clone()]

    return Recording(inputs, outputs, replay)


@pytest.mark.parametrize("mode", ["--train.precision bf16", "--train.exact true"])
def test_graphs_get_every_steps_inputs_and_hand_out_results_that_stay(
    world: World, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    flags = f"{ALL} {mode} --optim.name adamw --train.epochs 2"
    eager, replayed = opened(world, flags), opened(world, flags)
    monkeypatch.setattr(graphs, "record", record_by_calling)
    replayed.graphs = Graphs(pool=None)
    results = [[train_step(run) for _ in range(2 * run.sampler.steps_per_epoch)] for run in (eager, replayed)]
    assert [work.__name__ for work in replayed.graphs.recordings] == ["_gradients", "_update"]
    first, second = (checkpoint.tensors_sha256(run.module.state_dict()) for run in (eager, replayed))
    assert first == second
    losses, again = ([float(result.loss) for result in found] for found in results)
    assert losses == again  # read after all steps: later ones have not written over them
    assert len(set(losses)) == len(losses)
    assert eager.sampler.batch_rows(eager.sampler.steps_per_epoch - 1) < 128  # an epoch's last batch is smaller: not a graph's


def test_lr_of_a_tensor_reaches_the_update(world: World) -> None:
    found = []
    for wanted in (0.1, torch.tensor(0.5)):
        run = opened(world, "--model.name tiny")
        for group in run.optimizer.param_groups:
            group["lr"] = wanted
        optim.set_lr(run.optimizer, 0.25)
        found.append([float(group["lr"]) for group in run.optimizer.param_groups])
    assert found == [[0.25, 0.25]] * 2


def test_graphs_are_accepted_where_there_is_no_gpu_and_change_nothing(tmp_path: Path) -> None:
    flags = "--train.max_steps 6 --train.device cpu"
    plain, asked = (train(1, tmp_path / name, flags, f"--train.cuda_graphs {name}") for name in ("false", "true"))
    assert plain["weights_sha256"] == asked["weights_sha256"]
    assert "CUDA graphs" not in (tmp_path / "true-logs" / "rank-0.log").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
@pytest.mark.parametrize("mode", ["--train.exact true", "--train.precision bf16", "--train.precision bf16 --train.compile true"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_graphs_have_the_bits_of_a_step_kernel_by_kernel(tmp_path: Path, mode: str, name: str) -> None:
    flags = (ALL, mode, f"--train.device cuda --optim.name {name} --optim.lr 0.01 --train.epochs 3")
    plain, graphed = (train(1, tmp_path / each, *flags, f"--train.cuda_graphs {each}") for each in ("false", "true"))
    assert plain["weights_sha256"] == graphed["weights_sha256"]
    assert "CUDA graphs" in (tmp_path / "true-logs" / "rank-0.log").read_text()

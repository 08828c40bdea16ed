"""A step on the meta device shows what a GPU would have to do, without a GPU.

The meta device has shapes and no numbers. Reading a number there raises, and so does a tensor of another device. The
operations are counted. Each is at least one kernel, which takes a GPU several microseconds to start, whatever its size.
"""

import ast
import contextlib
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import ROOT, TORCH
from in_process import Run
from ranks.processes import Ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.cli import parse
from train.evaluate import predict
from train.step import prepare_step, train_step
from train.storage import data
from train.world.clock import Clock

META = torch.device("meta")
# Operations that make a view, or no tensor at all: no kernel.
VIEWS = """
view expand select slice detach alias transpose permute t unsqueeze split split_with_sizes as_strided _reshape_alias
empty empty_like empty_strided lift_fresh unbind squeeze is_same_size _has_compatible_shallow_copy_type
""".split()  # noqa: SIM905
EVERYTHING = (
    "--model.dropout 0.3 --augment.shift 2 --augment.rotate 10 --augment.erase 0.5 --optim.ema 0.9 --optim.clip_norm 1 "
    "--optim.label_smoothing 0.1 --train.num_micro_batches 4"
)
EXACT = "--train.exact true --train.num_micro_batches 4"


class Seen(TorchDispatchMode):
    """Count operations, and those that made a tensor on another device than meta."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.strays: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        # the fused optimizers have no meta kernel, and nothing uses what they would return
        out = None if name.startswith("_fused_") else func(*args, **(kwargs or {}))
        if name not in VIEWS and not str(func).startswith(("profiler.", "prim.")):
            self.kernels[name] += 1
        tensors = [each for each in torch.utils._pytree.tree_leaves(out) if isinstance(each, Tensor)]
        self.strays[name] += any(tensor.device != META for tensor in tensors)
        return out


class MetaWorld:
    """One rank whose device has no numbers."""

    rank = local_rank = 0
    world_size = local_world_size = num_threads = 1
    is_main, device = True, META

    def __init__(self) -> None:
        self.clock = Clock()
        self.accelerator = types.SimpleNamespace(
            scaler=None,
            autocast=contextlib.nullcontext,
            no_sync=lambda model: contextlib.nullcontext(),
            unscale_gradients=lambda optimizer: None,
        )

    def raising_together(self) -> Any:
        return contextlib.nullcontext()

    def broadcast(self, value: Any) -> Any:
        return value

    def prepare(self, model: Any, optimizer: Any) -> Any:
        return model, types.SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups)


@contextlib.contextmanager
def opened(flags: str) -> Iterator[Run]:
    """Set up a run on the meta device. Its optimizer accepts fused kernels there."""
    config = parse(f"--data.name random --data.random_examples 1000 --wandb.mode disabled {flags}".split())

    def split(num: int) -> data.Split:
        images = torch.zeros(num, 1, 28, 28, dtype=torch.uint8, device=META)
        return data.Split(images, torch.zeros(num, dtype=torch.int64, device=META))

    names = list("0123456789")
    source = data.Data("random", split(1000), split(160), "test", names, "0" * 64, [33.0], [78.0], False)
    with contextlib.ExitStack() as stack:
        for place in ("torch.optim.adam", "torch.optim.sgd"):
            stack.enter_context(mock.patch(f"{place}._device_dtype_check_for_fused", return_value=None))
        devices = "torch.optim.optimizer._get_fused_kernels_supported_devices"
        stack.enter_context(mock.patch(devices, return_value=["cpu", "cuda", "meta"]))
        yield Run.open(config, MetaWorld(), source)


def seen_step(run: Run) -> Seen:
    """Make a step and return its operations, without those of the host that fill the tables."""
    prepare_step(run.plan, run.state)
    with Seen() as seen:
        train_step(run.plan, run.state)
    run.state.step += 1
    return seen


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("mode", ["", EXACT])
@pytest.mark.parametrize(
    "model", ["cnn", "vgg --train.num_micro_batches 2", "vgg_wide --train.num_micro_batches 2", "tiny", "tiny_bn"]
)
def test_a_step_reads_no_number_and_stays_on_its_device(model: str, mode: str, optimizer: str) -> None:
    with opened(f"{EVERYTHING} --model.name {model} {mode} --optim.name {optimizer} --train.epochs 2") as run:
        for _ in range(3):  # over the end of an epoch, whose last batch is smaller
            seen = seen_step(run)
            assert seen.kernels["_fused_sgd_" if optimizer == "sgd" else "_fused_adamw_"] == 2
            assert +seen.strays == Counter()
        assert run.plan.sampler.steps_per_epoch == 2


@pytest.mark.parametrize(
    "flags", ["", "--augment.shift 2", "--augment.rotate 10 --augment.scale 0.1", "--train.channels_last false"]
)
def test_each_kind_of_input_stays_on_its_device(flags: str) -> None:
    with opened(f"{flags} --model.name tiny") as run:
        assert +seen_step(run).strays == Counter()
        with Seen() as seen:
            plan = run.plan
            predict(run.state.module, plan.data.test.images[:100], plan.data, plan.world, plan.memory_format)
        assert +seen.strays == Counter()


def test_this_test_sees_a_read_and_a_stray_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("--model.name tiny") as run:
        monkeypatch.setattr(
            "train.step._clip", lambda plan, state: torch.full((), float(state.parameters[0].sum()), device=META)
        )
        with pytest.raises(RuntimeError, match="meta"):
            seen_step(run)
        monkeypatch.setattr("train.step._clip", lambda plan, state: torch.zeros((), device=META) + torch.zeros(()))
        assert seen_step(run).strays["zeros"] == 1
        monkeypatch.setattr("train.step._clip", lambda plan, state: torch.zeros(3, device=META) + torch.zeros(3))
        with pytest.raises(RuntimeError, match="device"):
            seen_step(run)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", [8]),
        ("--train.max_micro_batch_size 128", [8]),
        ("--train.max_micro_batch_size 100", [6, 2]),
        ("--train.max_micro_batch_size 16", [1] * 8),
        ("--train.exact true", [1] * 8),
    ],
)
def test_a_rank_makes_as_few_passes_as_its_memory_allows(flags: str, expected: list[int]) -> None:
    with opened(f"--model.name tiny_bn --train.global_batch_size 128 --train.num_micro_batches 8 {flags}") as run:
        assert [len(part) for part in run.plan.passes] == expected
        assert seen_step(run).kernels["convolution_backward"] == 3 * len(expected)


# Operations of a step of each recipe, in fp32. Each takes a GPU 0.3 to 5 us, and without graphs the host about 5 us.
KERNELS = {"fast": 63, "quickstart": 63, "fast-99.5": 274, "mnist": 275, "best": 312}


@pytest.mark.skipif(
    TORCH < (2, 15), reason="counted with torch 2.15: 2.11 copies gradients of convolutions on this device"
)
@pytest.mark.parametrize("recipe", KERNELS)
def test_a_step_has_no_more_operations_than_it_had(recipe: str) -> None:
    with opened(f"--config configs/{recipe}.yaml --data.name random --train.precision fp32") as run:
        seen_step(run)  # makes the optimizer's state
        seen = seen_step(run)
    assert seen.kernels.total() == KERNELS[recipe], seen.kernels.most_common()


def test_optimizers_that_graphs_record_are_capturable() -> None:
    for name in ("sgd", "adamw"):
        with opened(f"--model.name tiny --optim.name {name}") as run:
            assert all(group["capturable"] for group in run.state.optimizer.param_groups)


@pytest.mark.parametrize("mode", ["", EXACT])
def test_nothing_that_reduces_over_a_gradient_sees_an_odd_address(tmp_path: Any, mode: str) -> None:
    """CUDA's kernels add in another order if an address is no multiple of 16, as in DDP's rebuilt buckets."""
    flags = f"--data.name digits --model.name cnn --train.device cpu --train.num_threads 1 --wandb.mode disabled {mode}"
    ranks = Ranks(2, flags.split(), tmp_path, "ranks.addresses")
    assert ranks.wait() == [0, 0], ranks.output()
    for log in ranks.logs:
        steps = ast.literal_eval(log.read_text().splitlines()[-1])
        assert [step["odd operations"] for step in steps] == [[]] * 3
        # Of 8, and without align_gradients the norm would get them. In exact mode each gradient has its own allocation.
        assert (steps[-1]["odd in buckets"] >= 5) == (not mode)
        assert steps[-1]["operations"] >= 3


FACTORIES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}
READS = {"item", "tolist", "numpy", "cpu", "nonzero"}
DEVICE_CODE = {  # functions of each module that work on the host
    "step": {"prepare_step"},
    "augment": set(),
    "rng": set(),
    "models": set(),
    "layers": set(),
    "graphs": set(),
    "optim": {"lr"},
    "tables": {"fill", "_send", "fetch_results", "decode_results", "read_results"},
    "warmup": set(),
    "reduce": set(),
}


def offences(source: str, allowed: set[str]) -> list[str]:
    """Return calls that read a tensor's number on the host, or make a tensor without a device."""
    found = []
    for function in (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name not in allowed
    ):
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            keywords = {keyword.arg for keyword in call.keywords}
            reads = name.split(".")[-1] in READS or name in ("float", "int", "bool")
            makes = name.startswith("torch.") and name.split(".")[-1] in FACTORIES and "device" not in keywords
            found += [f"{function.name}: {ast.unparse(call)}"] if reads or makes else []
    return found


@pytest.mark.parametrize("module", DEVICE_CODE)
def test_device_code_reads_no_number_and_names_the_device_of_new_tensors(module: str) -> None:
    (path,) = (ROOT / "train").rglob(f"{module}.py")
    assert offences(path.read_text(), DEVICE_CODE[module] | {"__init__", "build"}) == []


def test_the_rule_sees_offences() -> None:
    reads = "x.item(); x.mean().tolist(); float(x)"
    wrong = f"def f(x):\n  {reads}; torch.zeros(3); torch.arange(3, device=x.device); x.float()"
    assert len(offences(wrong, set())) == 4

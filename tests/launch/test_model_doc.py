"""The table of docs/model.md describes the network that `--model.name cnn` trains, as hooks on its layers see it."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import MNIST, ROOT
from torch.utils.flop_counter import FlopCounterMode

from train.config import ModelConfig
from train.functional.models import Cnn, build

Table = dict[str, list[str]]  # a row's title -> its other cells


@pytest.fixture(scope="module")
def table() -> Table:
    text = (ROOT / "docs" / "model.md").read_text().split("## The table")[1].split("##")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    poolings: Iterator[str] = iter(("first pooling", "second pooling"))
    return {next(poolings) if title == "max pooling" else title.split(" ")[0]: cells for title, *cells in rows[2:]}


@pytest.fixture(scope="module")
def volumes() -> dict[str, torch.Tensor]:
    """Return what enters and leaves the layers in the forward pass of one image."""
    model, found = build(ModelConfig(name="cnn"), *MNIST, 0), {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, given, out, name=name: found.update({f"{name} in": given[0], name: out}))
    with torch.no_grad():
        model(torch.zeros(1, 1, 28, 28))
    return found


def product(text: str) -> int:
    """Return the value of a product such as `(3 x 3 x 24 + 1) x 32`."""
    return eval(text.replace("x", "*").replace(",", ""), {})


def total(cell: str) -> int:
    """Return the number after a cell's formula, which must give it."""
    formula, _, number = cell.rpartition(" = ")
    value = int(number.replace(",", "").strip("*"))
    assert not formula or product(formula) == value
    return value


def test_volumes_are_those_of_the_forward_pass(table: Table, volumes: dict[str, torch.Tensor]) -> None:
    depth_of_last_map = volumes["conv2"].shape[1]
    found = {
        "input": volumes["conv1 in"],
        "`conv1`": volumes["conv1"],
        "first pooling": volumes["conv2 in"],
        "`conv2`": volumes["conv2"],
        "second pooling": volumes["fc1 in"].view(1, depth_of_last_map, 5, 5),
        "`fc1`": volumes["fc1"][:, :, None, None],
        "`fc2`": volumes["fc2"][:, :, None, None],
    }
    shapes = {name: "{3} x {2} x {1}".format(*volume.shape) for name, volume in found.items()}
    assert shapes == {name: cells[1] for name, cells in table.items() if name != "**sum**"}


def test_parameters_and_kernels_are_those_of_the_layers(table: Table) -> None:
    model = build(ModelConfig(name="cnn"), *MNIST, 0)
    for name, layer in model.named_children():
        if parameters := [parameter.numel() for parameter in layer.parameters()]:
            assert total(table[f"`{name}`"][2]) == sum(parameters)
        if isinstance(layer, torch.nn.Conv2d):
            assert table[f"`{name}`"][0] == " x ".join(map(str, layer.kernel_size))
    assert total(table["**sum**"][2]) == sum(parameter.numel() for parameter in model.parameters())
    assert total(table["**sum**"][2]) == sum(total(cells[2]) for name, cells in table.items() if name != "**sum**")


def multiply_adds(name: str) -> int:
    """Return the multiply-adds as torch counts them: two operations each, without BatchNorm."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        build(ModelConfig(name=name), *MNIST, 0).eval()(torch.zeros(1, 1, 28, 28))
    return counter.get_total_flops() // 2


def test_multiply_adds_are_what_torch_counts(table: Table, volumes: dict[str, torch.Tensor]) -> None:
    for name, layer in build(ModelConfig(name="cnn"), *MNIST, 0).named_children():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            assert total(table[f"`{name}`"][4]) == volumes[name].numel() * layer.weight[0].numel()
    assert total(table["**sum**"][4]) == multiply_adds("cnn")


def test_vgg_has_one_percent_fewer_parameters_and_five_times_the_work() -> None:
    models = (build(ModelConfig(name=name), *MNIST, 0) for name in ("cnn", "vgg"))
    cnn, vgg = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
    assert round(100 * vgg / cnn) == 99
    assert round(multiply_adds("vgg") / multiply_adds("cnn")) == 5


def test_receptive_fields_are_what_gradients_reach(table: Table) -> None:
    """The field of a number in the middle of a volume is the pixels that have a gradient over many random images."""
    model = Cnn(*MNIST, 0.0, (4, 8, 16))
    inputs = torch.rand(256, 1, 28, 28, generator=torch.Generator().manual_seed(0), requires_grad=True)
    first = model.conv1(inputs)
    pooled = F.max_pool2d(first, 2)
    second = model.conv2(pooled)
    last = F.max_pool2d(second, 2)
    hidden = model.fc1(last.flatten(1))[:, :, None, None]
    found = {"`conv1`": first, "first pooling": pooled, "`conv2`": second, "second pooling": last, "`fc1`": hidden}
    for name, volume in found.items():
        middle = volume.shape[2] // 2
        (gradient,) = torch.autograd.grad(volume[:, :, middle, middle].sum(), inputs, retain_graph=True)
        rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        side = int(rows[-1] - rows[0]) + 1
        assert table[name][3] == f"{side} x {side}"

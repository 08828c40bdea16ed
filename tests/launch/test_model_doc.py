"""The table of docs/model.md is the code's, and its numbers are right by other ways of counting."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from launch.model import layers, main, table
from train.functional.models import MODELS, Cnn

DOC = Path(__file__).parents[2] / "docs" / "model.md"
BEGIN, END = "<!-- table: python -m launch model -->\n", "\n<!-- end of table -->"


def test_table_in_the_docs_is_the_generated_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    generated = capsys.readouterr().out
    written = DOC.read_text().split(BEGIN)[1].split(END)[0]
    assert written == generated.rstrip("\n"), f"{DOC.name} is out of date: paste the output of `python -m launch model`"


@pytest.mark.parametrize("name", MODELS)
def test_sums_agree_with_torch(name: str) -> None:
    model = MODELS[name](0.0).eval()
    found = layers(model)
    assert sum(layer.parameters for layer in found) == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:  # counts a multiply-add as two, and no BatchNorm
        model(torch.zeros(1, 1, 28, 28))
    counted = sum(layer.multiply_adds for layer in found if "batch normalization" not in layer.title)
    assert 2 * counted == counter.get_total_flops()
    assert found[-1].volume == (1, 1, 10)


@pytest.mark.parametrize("name", MODELS)
def test_formulas_give_their_numbers(name: str) -> None:
    for layer in layers(MODELS[name](0.0)):
        for formula, number in (
            (layer.parameters_formula, layer.parameters),
            (layer.multiply_adds_formula, layer.multiply_adds),
        ):
            assert not formula or eval(formula.replace("x", "*")) == number


def test_receptive_fields_are_what_gradients_reach() -> None:
    """The pixels that a number in the middle of a volume has a gradient for, over many random images, are its field."""
    model = Cnn((4, 8), 16)
    inputs = torch.rand(256, 1, 28, 28, generator=torch.Generator().manual_seed(0), requires_grad=True)
    first = model.conv1(inputs)
    pooled = F.max_pool2d(first, 2)
    second = model.conv2(pooled)
    volumes = [first, pooled, second, F.max_pool2d(second, 2)]
    volumes.append(model.fc1(volumes[-1].flatten(1))[:, :, None, None])
    expected = [layer.receptive_field for layer in layers(model)[1:6]]
    for volume, side in zip(volumes, expected, strict=True):
        middle = volume.shape[2] // 2
        (gradient,) = torch.autograd.grad(volume[:, :, middle, middle].sum(), inputs, retain_graph=True)
        rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        assert int(rows[-1] - rows[0]) + 1 == side


def test_layers_without_a_row_are_refused() -> None:
    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(28))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs * self.weight

    with pytest.raises(AssertionError, match="missing from Walk"):
        table(Strange())


def test_stride_and_padding_are_seen() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, stride=2, padding=1), torch.nn.MaxPool2d(3, stride=1))
    convolution, pooling = layers(model)[1:]
    assert (convolution.kernel, convolution.volume, convolution.receptive_field) == (
        "3 x 3, stride 2, padding 1",
        (14, 14, 2),
        3,
    )
    assert (pooling.kernel, pooling.volume, pooling.receptive_field) == ("3 x 3, stride 1", (12, 12, 2), 7)

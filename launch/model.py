"""`python -m launch model`: the layers of a model as a Markdown table, for docs/model.md.

The table is read off a forward pass of one image: every torch function that the pass calls is intercepted, so modules and
plain functions are seen alike. Invariant: the parameters of the rows add up to those of the model, or it fails.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from train.cli import Parser
from train.config import ModelConfig

if TYPE_CHECKING:
    from torch import nn

IMAGE_SIDE = 28  # pixels
# The torch functions that make rows, with the names of their leading arguments.
SIGNATURES = {
    "conv2d": ("input", "weight", "bias", "stride", "padding"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    "max_pool2d": ("input", "kernel_size", "stride"),
    "linear": ("input", "weight", "bias"),
    "relu": ("input",),
}
COLUMNS = ("layer", "kernel", "output volume W x H x D", "parameters", "receptive field", "multiply-adds")


@dataclass
class Layer:
    """One row: what it is called, what leaves it and what it costs. Formulas are products and sums as a reader checks them."""

    title: str
    kernel: str
    volume: tuple[int, int, int]  # width, height, depth
    receptive_field: int  # side in pixels of the image, cut off at its border
    parameters: int = 0
    parameters_formula: str = ""
    multiply_adds: int = 0
    multiply_adds_formula: str = ""


@dataclass
class Walk:
    """Collects one Layer per call in SIGNATURES; its methods have their names and get the call's result and arguments."""

    names: dict[int, str]  # id of a parameter -> name of the module that has it
    layers: list[Layer] = field(default_factory=list)
    jump: int = 1  # pixels of the image between neighbours of the current volume

    def title(self, kind: str, given: dict[str, Any]) -> str:
        """The name of the module whose weight the call uses, and what it does."""
        return f"`{self.names[id(given['weight'])]}` {kind}"

    def widen(self, kernel: int, stride: int) -> int:
        """Slide a kernel over the current volume; return the side of the receptive field after it."""
        side = self.layers[-1].receptive_field + (kernel - 1) * self.jump
        self.jump *= stride
        return min(side, IMAGE_SIDE)

    def conv2d(self, out: Any, given: dict[str, Any]) -> None:
        """Enter a convolution: D kernels slide over the volume."""
        weight, bias, stride, padding = given["weight"], given["bias"], given["stride"][0], given["padding"][0]
        depth, depth_in, side = weight.shape[0], weight.shape[1], weight.shape[2]
        volume = (out.shape[3], out.shape[2], depth)
        per_kernel = f"{side} x {side} x {depth_in}"
        kernel = (
            f"{side} x {side}{f', stride {stride}' if stride > 1 else ''}{f', padding {padding}' if padding else ''}"
        )
        self.layers.append(
            Layer(
                self.title("convolution", given),
                kernel,
                volume,
                self.widen(side, stride),
                weight.numel() + (depth if bias is not None else 0),
                f"({per_kernel} + 1) x {depth}" if bias is not None else f"{per_kernel} x {depth}",
                out.numel() * weight[0].numel(),
                f"({shape(volume)}) x ({per_kernel})",
            )
        )

    def batch_norm(self, out: Any, given: dict[str, Any]) -> None:
        """Enter a batch normalization: a factor and a summand for each of the D maps."""
        depth = out.shape[1]
        volume = (out.shape[3], out.shape[2], depth)
        title, before = self.title("batch normalization", given), self.layers[-1].receptive_field
        self.layers.append(Layer(title, "", volume, before, 2 * depth, f"2 x {depth}", out.numel(), shape(volume)))

    def max_pool2d(self, out: Any, given: dict[str, Any]) -> None:
        """Enter a max pooling; without a stride it is the kernel's side."""
        side = given["kernel_size"]
        stride = given.get("stride") or side
        volume = (out.shape[3], out.shape[2], out.shape[1])
        self.layers.append(Layer("max pooling", f"{side} x {side}, stride {stride}", volume, self.widen(side, stride)))

    def linear(self, out: Any, given: dict[str, Any]) -> None:
        """Enter a fully connected layer: a convolution whose kernel is the whole volume."""
        num_outputs, num_inputs = given["weight"].shape
        side = self.layers[-1].volume[0]
        self.layers.append(
            Layer(
                self.title("fully connected", given),
                f"{side} x {side}",
                (1, 1, num_outputs),
                self.widen(side, 1),
                (num_inputs + 1) * num_outputs,
                f"({num_inputs} + 1) x {num_outputs}",
                num_inputs * num_outputs,
                f"{num_outputs} x {num_inputs}",
            )
        )

    def relu(self, out: Any, given: dict[str, Any]) -> None:
        """Fold a ReLU into the layer that it follows."""
        self.layers[-1].title += ", ReLU"


def shape(volume: tuple[int, int, int]) -> str:
    """`24 x 24 x 32`."""
    return " x ".join(map(str, volume))


def layers(model: "nn.Module") -> list[Layer]:
    """Return a model's layers in the order of its forward pass; the first one is its input."""
    import torch
    from torch.overrides import TorchFunctionMode

    names = {id(parameter): name.rpartition(".")[0] for name, parameter in model.named_parameters()}
    walk = Walk(names, [Layer("input", "", (IMAGE_SIDE, IMAGE_SIDE, 1), 1)])

    class Intercept(TorchFunctionMode):
        """Shows each torch function that is called to the walk."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = getattr(func, "__name__", "")
            if name in SIGNATURES:
                given = dict(zip(SIGNATURES[name], args, strict=False)) | (kwargs or {})
                getattr(walk, name)(out, given)
            return out

    with torch.no_grad(), Intercept():
        model.eval()(torch.zeros(1, 1, IMAGE_SIDE, IMAGE_SIDE))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(layer.parameters for layer in walk.layers) == total, "a layer with parameters is missing from Walk"
    return walk.layers


def table(model: "nn.Module") -> str:
    """Return the Markdown table of a model's layers, with the sums in its last row."""

    def cost(number: int, formula: str) -> str:
        return f"{formula} = {number:,}" if number else "0"

    found = layers(model)
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for layer in found:
        parameters = cost(layer.parameters, layer.parameters_formula)
        side, multiply_adds = layer.receptive_field, cost(layer.multiply_adds, layer.multiply_adds_formula)
        rows.append((layer.title, layer.kernel, shape(layer.volume), parameters, f"{side} x {side}", multiply_adds))
    sums = [
        f"**{sum(numbers):,}**" for numbers in zip(*((row.parameters, row.multiply_adds) for row in found), strict=True)
    ]
    rows.append(("**sum**", "", "", sums[0], "", sums[1]))
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows)


def main(argv: list[str]) -> int:
    """Print the table of the model that --name says; return the exit code."""
    names = get_args(get_type_hints(ModelConfig)["name"])
    parser = Parser(prog="python -m launch model", description="Print the layers of a model as a Markdown table.")
    parser.add_argument("--name", choices=names, default="cnn", help="which model (default: cnn)")
    name = parser.parse_args(argv).name
    from train.functional.models import MODELS

    print(table(MODELS[name](0.0)))
    return 0

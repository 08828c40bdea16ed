"""The network of a run: a built-in one, or one that the user's Python file builds; and the weights to start from.

Invariant: the source's content, the seed and the shape of the data decide the network, wherever the source lies. A
network that breaks a law of `functional/probe.py` is refused. What a source reads from other files, or imports from
elsewhere, is not recorded.
"""

import contextlib
import hashlib
import sys
import sysconfig
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from train.config import ModelConfig
from train.errors import UserError, did_you_mean, one_line, refused
from train.functional import layers, models, probe
from train.functional.models import Shape
from train.functional.trajectory import differences

MODULE = "lockstep_network"  # the name under which a source is imported
# A virtual environment may lie in the folder of a source.
INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_imported: list[str] = []  # the modules of the last source: the next one has others of the same names


@dataclass(frozen=True)
class Network:
    """A network on the CPU, in training mode, with our layers in place of torch's; and what it was made of."""

    module: nn.Module
    sources: dict[str, bytes] = field(default_factory=dict)  # of the user's network, by path relative to its file
    sha256: dict[str, str] = field(default_factory=dict)  # of "network" and "initial_weights", if they come from files


def build(
    config: ModelConfig,
    shape: Shape,
    num_classes: int,
    seed: int,
    channels_last: bool = False,
    is_averaged: bool = False,
) -> Network:
    """Build the network for images of `shape`, with weights drawn from `seed` or read from model.weights.

    A user's network is checked with images laid out as `channels_last` says, and copied if it `is_averaged`. Raises
    UserError.
    """
    if config.source and config.dropout:
        raise UserError(f"model.dropout is {config.dropout}, but {config.name} is not built in. Use nn.Dropout there.")
    if config.weights_skip and not config.weights:
        raise UserError(f"model.weights_skip is {config.weights_skip}, without model.weights. Give both.")
    if config.source:
        with _refusing(config.name, config.source[0].resolve().parent):
            network = _build_own(*config.source, (shape, num_classes), seed, channels_last, is_averaged)
    else:
        network = Network(models.build(config, shape, num_classes, seed))
    if config.weights:
        network.sha256["initial_weights"] = _read_weights(network.module, Path(config.weights), config.weights_skip)
    return network


def _build_own(
    file: Path, function: str, sizes: tuple[Shape, int], seed: int, channels_last: bool, is_averaged: bool
) -> Network:
    """Execute the user's file, build its network twice, and check one of the two."""
    if not file.is_file():
        raise UserError(f"there is no file {file}. Expected FILE.py:FUNCTION. A run keeps its own in RUN/network/.")
    path = file.resolve()
    with _importing_from(path.parent) as sources, models.drawing_from(seed):
        before, content = probe.generators()[1:], path.read_bytes()
        source = types.ModuleType(MODULE)
        source.__file__ = str(path)
        sys.modules[MODULE] = source  # dataclasses and torch.compile look it up
        exec(compile(content, path, "exec"), vars(source))
        make = getattr(source, function, None)
        if not callable(make):
            raise UserError(f"{path.name} has no function {function}. {did_you_mean(function, dir(source), 'Add it.')}")
        with models.drawing_from(seed):
            module = make(*sizes)
        with models.drawing_from(seed):
            twin = make(*sizes)
        for made in (module, twin):
            if not isinstance(made, nn.Module):
                raise UserError(f"It returned {type(made).__name__}, expected a torch.nn.Module.")
            frozen = {layer for layer in made.modules() if not layer.training}
            made.train()
            if not made.training:
                raise UserError("train() leaves it in evaluation mode. Call super().train(mode) there.")
            modes = [(name or "It", layer.training) for name, layer in made.named_modules() if layer in frozen]
            if ended := [name for name, is_training in modes if is_training]:
                raise UserError(f"{probe.listed(ended)} is in evaluation mode, which training ends. Override train().")
            layers.convert(made.cpu())
        if {*module.parameters()} & {*twin.parameters()}:
            raise UserError(f"{function} returned a layer twice. Make new ones in each call.")
        probe.check(twin, *sizes, channels_last, twin=module, is_averaged=is_averaged)
        module.train()
        if probe.generators()[1:] != before:
            raise UserError(probe.NOT_BY_SEED)
    digest = hashlib.sha256(content)  # without the file's name: a file may be renamed, unlike what it imports
    for neighbour, text in sorted(sources.items()):
        digest.update(f"{neighbour} {len(text)}\n".encode() + text)
    return Network(module, {**sources, path.name: content}, {"network": digest.hexdigest()})


@contextlib.contextmanager
def _refusing(name: str, folder: Path) -> Iterator[None]:
    """Turn an error of the user's code into a UserError of one line, with the last line of a file in `folder`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"model.name {name}: {error}") from error
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == folder]
        place = f" in line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""
        raise UserError(f"model.name {name}: {type(error).__name__}{place}: {one_line(error, 300)}") from error


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[dict[str, bytes]]:
    """Let imports find the modules in a folder; fill the mapping with the content of those that were imported."""
    while _imported:
        sys.modules.pop(_imported.pop(), None)
    sources: dict[str, bytes] = {}
    known = {MODULE, *sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield sources
    finally:
        sys.path.remove(str(folder))
        for name in sys.modules.keys() - known:
            path = Path(getattr(sys.modules[name], "__file__", None) or "/").resolve()
            if path.is_relative_to(folder) and not any(path.is_relative_to(place) for place in INSTALLED):
                _imported.append(name)
                sources[path.relative_to(folder).as_posix()] = path.read_bytes()


@torch.no_grad()
def _read_weights(module: nn.Module, path: Path, skip: str | None) -> str:
    """Copy a file's tensors into a network, but for those whose names start with `skip`; return the file's SHA-256."""
    if not path.is_file():  # a pipe would block
        raise UserError(f"model.weights {path} is not a file. Expected a .safetensors file.")
    with refused(f"model.weights {path} cannot be read as a .safetensors file"):
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
    own = module.state_dict()
    if skip and not any(name.startswith(skip) for name in own):
        raise UserError(f"model.weights_skip is {skip}, but no tensor's name starts so. One of them is {min(own)}.")

    def shapes(named: dict[str, Tensor]) -> dict[str, list[int]]:
        kept = {name for name in named if not name.endswith("num_batches_tracked")}  # our BatchNorm has none
        return {name: list(named[name].shape) for name in kept if not (skip and name.startswith(skip))}

    if changed := differences(shapes(tensors), shapes(own)):
        advice = "Leave a head out by its prefix: --model.weights_skip PREFIX"
        raise UserError(f"model.weights {path} does not fit: {probe.listed(changed)}. {advice}")
    for name in shapes(own):
        if not tensors[name].is_floating_point() or not tensors[name].float().isfinite().all():
            raise UserError(f"model.weights {path}: {name} is {tensors[name].dtype} or not finite. Expected floats.")
        own[name].copy_(tensors[name])
    return hashlib.sha256(content).hexdigest()

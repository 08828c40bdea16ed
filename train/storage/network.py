"""The network of a run: a built-in one, or one that the user's Python file builds; and the weights to start from.

Invariant: the source's content, the seed and the shape of the data decide the network, wherever the source lies. A
network that breaks a law of `functional/probe.py` is refused. What a source reads from other files, or imports from
elsewhere, is not recorded.
"""

import contextlib
import hashlib
import importlib
import inspect
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from train.config import ModelConfig
from train.errors import UserError, did_you_mean, one_line
from train.functional import layers, models, probe
from train.functional.hashing import key
from train.functional.trajectory import differences
from train.storage.checkpoint import tensors_sha256

Sizes = tuple[tuple[int, int, int], int]  # an image's channels, height and width, and the number of classes
MODULE = "lockstep_network"  # the name under which a source is imported
# A virtual environment may lie in the folder of a source.
INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
MAX_DIFFERENCES = 3  # in a message
_imported: set[str] = set()  # the modules of the last source: the next one has others of the same names


@dataclass(frozen=True)
class Network:
    """A network on the CPU, in training mode, with our layers in place of torch's; and what it was made of."""

    module: nn.Module
    sources: dict[str, bytes] = field(default_factory=dict)  # of the user's network, by path relative to its file
    sha256: dict[str, str] = field(default_factory=dict)  # of "network" and "weights", if they come from files


def build(
    config: ModelConfig,
    shape: tuple[int, int, int],
    num_classes: int,
    seed: int,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Network:
    """Build the network for images of `shape` (C, H, W), with weights drawn from `seed` or read from model.weights.

    `memory_format` is that of the inputs, for the checks. Raises UserError.
    """
    if config.source and config.dropout:
        raise UserError(f"model.dropout is {config.dropout}, but {config.name} is not built in. Use nn.Dropout there.")
    if config.weights_skip and not config.weights:
        raise UserError(f"model.weights_skip is {config.weights_skip}, without model.weights. Give both.")
    if config.source:
        network = _build_own(config.name, *config.source, (shape, num_classes), seed, memory_format)
    else:
        network = Network(models.build(config, shape, num_classes, seed))
    if config.weights:
        network.sha256["weights"] = _read_weights(network.module, Path(config.weights), config.weights_skip)
    return network


def _build_own(name: str, file: Path, function: str, sizes: Sizes, seed: int, layout: torch.memory_format) -> Network:
    """Import the user's file, build its network twice, and check one of the two."""
    path = file.resolve()
    with _refusing(name, path.parent), _importing_from(path.parent) as sources, _seeded(seed):
        before, content = probe.generators()[1:], path.read_bytes()
        make = _find_function(path, content, function, sizes)
        module, twin = (_make(make, sizes, seed) for _ in range(2))
        first, second = (tensors_sha256(probe.copies(made)) for made in (module, twin))
        if first != second or probe.generators()[1:] != before:
            raise UserError(f"{function} draws weights that `seed` does not decide. Draw them with torch alone.")
        layers.convert(module)
        probe.check(layers.convert(twin), *sizes, layout)
    sources[path.name] = content  # what was executed
    sums = [f"{hashlib.sha256(sources[name]).hexdigest()}  {name}\n" for name in sorted(sources)]
    # A file alone may be renamed. Its neighbours are imported by their names.
    whole = content if len(sources) == 1 else "".join(sums).encode()
    return Network(module, sources, {"network": hashlib.sha256(whole).hexdigest()})


def _find_function(path: Path, content: bytes, function: str, sizes: Sizes) -> Callable[..., Any]:
    """Execute a source and return its function, which must accept (shape, num_classes)."""
    source = types.ModuleType(MODULE)
    source.__file__ = str(path)
    sys.modules[MODULE] = source  # dataclasses and torch.compile look it up
    exec(compile(content, path, "exec", dont_inherit=True), vars(source))
    make = getattr(source, function, None)
    if not callable(make):
        raise UserError(f"{path.name} has no function {function}. {did_you_mean(function, dir(source), '')}".rstrip())
    try:
        inspect.signature(make).bind(*sizes)
    except TypeError as error:
        raise UserError(f"{function} must accept (shape, num_classes): {error}.") from None
    return make


def _make(make: Callable[..., Any], sizes: Sizes, seed: int) -> nn.Module:
    """Call the user's function."""
    with _seeded(seed):
        module = make(*sizes)
    if not isinstance(module, nn.Module):
        raise UserError(f"It returned {type(module).__name__}, expected a torch.nn.Module.")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise UserError(f"{name} has no shape yet. Give the layer its input size instead of a lazy layer.")
    return module.cpu().train()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator inside, as for the built-in networks, and put it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "init") % 2**63)
        yield


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
    for name in _imported:
        sys.modules.pop(name, None)
    _imported.clear()
    importlib.invalidate_caches()
    sources: dict[str, bytes] = {}
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield sources
    finally:
        sys.path.remove(str(folder))
        for name in sys.modules.keys() - known - {MODULE}:
            path = Path(getattr(sys.modules[name], "__file__", None) or "/")
            if path.is_relative_to(folder) and not any(path.is_relative_to(place) for place in INSTALLED):
                _imported.add(name)
                sources[path.relative_to(folder).as_posix()] = path.read_bytes()


@torch.no_grad()
def _read_weights(module: nn.Module, path: Path, skip: str | None) -> str:
    """Copy a file's tensors into a network, but for those whose names start with `skip`; return the file's SHA-256."""
    try:
        content = path.read_bytes() if path.is_file() else b""
        tensors = safetensors.torch.load(content)
    except (OSError, safetensors.SafetensorError) as error:
        reason = one_line(error, 100) if path.is_file() else "no such file"
        raise UserError(f"model.weights {path} cannot be read: {reason}. Expected a .safetensors file.") from None
    own = module.state_dict()
    if skip and not any(name.startswith(skip) for name in own):
        raise UserError(f"model.weights_skip is {skip}, but no tensor's name starts so. One of them is {min(own)}.")

    def shapes(named: dict[str, Tensor]) -> dict[str, list[int]]:
        kept = {name for name in named if not name.endswith("num_batches_tracked")}  # our BatchNorm has none
        return {name: list(named[name].shape) for name in kept if not (skip and name.startswith(skip))}

    if changed := differences(shapes(tensors), shapes(own)):
        advice = "Leave a head out by its prefix: --model.weights_skip PREFIX"
        raise UserError(f"model.weights {path} does not fit: {', '.join(changed[:MAX_DIFFERENCES])}. {advice}")
    for name in shapes(own):
        own[name].copy_(tensors[name])
    return hashlib.sha256(content).hexdigest()

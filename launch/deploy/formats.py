"""Trained models ready to use: taken from a run directory, written to and read from one file, safetensors or ONNX.

Invariant: a file holds, with the weights, what its inputs need (mean, std) and what its outputs mean (class names). It
is verified against its SHA-256 before use, and nothing is unpickled. torch is imported in functions.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from train.config import ModelConfig
from train.errors import UserError, refused
from train.rundir import EXAMPLE, RunDir

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.storage.checkpoint import Snapshot

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx"}
BATCH = 500  # images per pass
EXPORTED_OPSET, LOWEST_OPSET = 18, 15  # the lowest of torch's exporter; of our operators


@dataclass(frozen=True)
class Facts:
    """What a file says of itself: one metadata string per field, JSON where it is no string."""

    model: str  # a built-in network, or FILE.py:FUNCTION
    network_sha256: str  # of the source of the user's network; "" if it is built in
    data: str
    shape: list[int]  # of an image: channels, height, width
    class_names: list[str]
    mean: list[float]  # of each channel's training pixels, 0..255: inputs = (images - mean) / std
    std: list[float]
    weights: str  # raw, or ema: averaged
    weights_sha256: str
    step: int
    config: dict[str, Any]  # the trajectory config

    def encode(self) -> dict[str, str]:
        """Return the metadata strings."""
        values = dataclasses.asdict(self)
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}

    @classmethod
    def decode(cls, strings: dict[str, str], source: Path) -> "Facts":
        """Read metadata strings. Raises UserError, naming what is missing."""
        with refused(f"{source} was not written by launch export. Its metadata lack"):
            types = get_type_hints(cls)
            values: Any = {name: strings[name] if types[name] is str else json.loads(strings[name]) for name in types}
            facts = cls(**values)
            facts.check()
        return facts

    def check(self) -> None:
        """Raise ValueError if a field is not what it must be."""
        from train.functional.models import MODELS

        if self.model not in MODELS and not self.network_sha256:
            raise ValueError(f"a known model (got {self.model!r:.40})")
        names, shape = self.class_names, self.shape
        if not (isinstance(names, list) and len(names) > 1 and all(isinstance(name, str) for name in names)):
            raise ValueError(f"a list of class_names (got {names!r:.40})")
        if not (isinstance(shape, list) and [type(size) for size in shape] == [int] * 3 and min(shape) > 0):
            raise ValueError(f"a shape of images (got {shape!r:.40})")
        for name, low in (("mean", 0), ("std", 1e-9)):
            values = getattr(self, name)
            if not (isinstance(values, list) and len(values) == shape[0] and all(low <= v < 256 for v in values)):
                raise ValueError(f"{name} of each channel's pixels (got {values!r:.40})")


@dataclass(frozen=True)
class Deployed:
    """A model that classifies: `logits` maps inputs float32 [B,C,H,W] to float32 [B,K], on the CPU."""

    facts: Facts
    logits: "Callable[[Tensor], Tensor]"

    def scores(self, images: "Tensor") -> "Tensor":
        """Return logits float32 [N,K] of images uint8 or float [N,C,H,W] in 0..255."""
        import torch

        from train.functional.augment import normalize

        with torch.no_grad():
            inputs = normalize(images, self.facts.mean, self.facts.std)
            return torch.cat([self.logits(batch).float() for batch in inputs.split(BATCH)])


def warn(message: str) -> None:
    """Print a line to stderr: what `predict` prints to stdout may be read by a program."""
    print(message, file=sys.stderr)


def choose_checkpoint(run: RunDir) -> "tuple[Path, Snapshot]":
    """Return a run's best checkpoint, or its newest whole one if the best is gone. Raises UserError if it has none."""
    from train.storage import checkpoint

    found = checkpoint.latest(run.checkpoints, warn)
    if found is None:
        raise UserError(f"{run.path} has no checkpoint. Expected the directory of a run, such as {EXAMPLE}.")
    path, newest = found[0], checkpoint.decode(found[1])
    best = newest.meta["best"]
    if best is None or best["step"] == newest.meta["step"]:
        return path, newest
    best_path = run.checkpoints / f"step-{best['step']:08d}"
    try:
        return best_path, checkpoint.decode(checkpoint.read(best_path))
    except checkpoint.Damaged as error:
        warn(f"warning: {error} It was the best one; taking the newest.")
        return path, newest


def from_run(run_dir: Path, model: str, weights: str | None = None, path: Path | None = None) -> Deployed:
    """Take a model from a run: its best checkpoint or `path`, its averaged weights if there are any or `weights`.

    `model` is the run's model.name, with the place where its file is now. Raises UserError.
    """
    from train.storage import checkpoint

    run = RunDir(run_dir)
    with refused(f"A checkpoint in {run.checkpoints} is not one of this program's. It lacks"):
        path, state = (path, checkpoint.decode(checkpoint.read(path))) if path else choose_checkpoint(run)
        weights = weights or ("ema" if state.ema else "raw")
        tensors = state.ema if weights == "ema" else state.model
        if not tensors:
            raise UserError(f"{path} has no averaged weights: the run's optim.ema is 0. Use --weights raw.")
        facts = Facts(
            model=Path(model).name,
            network_sha256=state.meta["sha256"].get("network", ""),
            data=state.meta["data"]["name"],
            **{name: state.meta["data"][name] for name in ("shape", "class_names", "mean", "std")},
            weights=weights,
            weights_sha256=checkpoint.tensors_sha256(tensors),
            step=state.meta["step"],
            config=state.meta["trajectory"],
        )
        facts.check()
    return Deployed(facts, build(facts, tensors, model))


def load(place: Path, model: str | None) -> Deployed:
    """Take a model from the directory of a run, or read an exported file. Raises UserError."""
    if not place.is_dir():
        return read(place, model)
    config = RunDir(place).read_config() or {}
    return from_run(place, model or config.get("model", {}).get("name", ""))


def build(facts: Facts, tensors: "dict[str, Tensor]", model: str | None) -> "nn.Module":
    """Build the model with these weights, ready to evaluate; `model` says where the file of the user's network is.

    Raises UserError if it is another network.
    """
    from train.storage import checkpoint, network

    channels, height, width = facts.shape
    if facts.network_sha256 and not model:
        raise UserError(
            f"These are weights of a network of {facts.model}. Pass that file: --model-file FILE.py:FUNCTION."
        )
    config = ModelConfig(name=model if facts.network_sha256 and model else facts.model)
    built = network.build(config, (channels, height, width), len(facts.class_names), 0)
    if (found := built.sha256.get("network", "")) != facts.network_sha256:
        raise UserError(f"{model} has SHA-256 {found[:12]}, but the weights are of {facts.network_sha256[:12]}.")
    built.module.eval().requires_grad_(False)
    checkpoint.restore_model(built.module, tensors)
    return built.module


def require_onnx() -> Any:
    """Return the modules onnx and onnxruntime. Raises UserError if one is missing."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(f'ONNX needs the package {error.name}: pip install "lockstep[export]".') from None
    return onnx, onnxruntime


def graph_sha256(proto: Any) -> str:
    """Return the SHA-256 of an ONNX graph, weights included."""
    return hashlib.sha256(proto.graph.SerializeToString(deterministic=True)).hexdigest()


def for_old_runtimes(proto: Any) -> Any:
    """Return an ONNX model with a lower opset if its operators have one, and the lowest IR version of its opset."""
    import onnx.version_converter
    import onnxruntime

    with contextlib.suppress(Exception):  # both refuse operators that are newer, in errors of many types
        lower = onnx.version_converter.convert_version(proto, LOWEST_OPSET)
        onnxruntime.InferenceSession(lower.SerializeToString(), providers=["CPUExecutionProvider"])
        proto = lower
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    return proto


def describe(path: Path) -> str:
    """Return what a runtime must support to read a file; "" for safetensors."""
    if path.suffix != SUFFIXES["onnx"]:
        return ""
    proto = require_onnx()[0].load(path, load_external_data=False)
    return f", ONNX opset {proto.opset_import[0].version}, IR version {proto.ir_version}"


def write(deployed: Deployed, path: Path) -> None:
    """Write a model taken by `from_run` to a file, in the format of its suffix."""
    import safetensors.torch
    import torch

    from train.storage import checkpoint

    facts, module = deployed.facts, deployed.logits
    assert isinstance(module, torch.nn.Module)
    if path.suffix == SUFFIXES["safetensors"]:
        path.write_bytes(safetensors.torch.save(checkpoint.model_tensors(module), facts.encode()))
        return
    onnx, _ = require_onnx()
    options: Any = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "opset_version": EXPORTED_OPSET}
    options |= {"input_names": ["inputs"], "output_names": ["logits"]}
    example = (torch.zeros(2, *facts.shape),)  # 2: a batch of 1 would be fixed
    with refused(f"{facts.model} cannot be exported to ONNX"):
        graph = torch.onnx.export(module, example, dynamo=True, verbose=False, **options)
    assert graph is not None
    proto = for_old_runtimes(graph.model_proto)
    onnx.helper.set_model_props(proto, facts.encode() | {"graph_sha256": graph_sha256(proto)})
    path.write_bytes(proto.SerializeToString())


def read(path: Path, model: str | None = None) -> Deployed:
    """Read an exported file and verify it; `model` is FILE.py:FUNCTION of the user's network. Raises UserError."""
    if path.suffix not in SUFFIXES.values() or not path.is_file():
        kinds = " or ".join(SUFFIXES.values())
        raise UserError(f"{path} is no model. Expected the directory of a run, or a {kinds} file of `launch export`.")
    return read_onnx(path) if path.suffix == SUFFIXES["onnx"] else read_safetensors(path, model)


def check_sha256(path: Path, found: str, expected: str) -> None:
    """Raise UserError if what was read from a file does not have the SHA-256 that its metadata hold."""
    if found != expected:
        raise UserError(f"{path} is damaged: its weights have SHA-256 {found[:12]}, expected {expected[:12]}.")


def read_safetensors(path: Path, model: str | None) -> Deployed:
    """Read and verify a safetensors file."""
    import safetensors

    from train.storage import checkpoint

    with refused(f"{path} is not a whole safetensors file"), safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = Facts.decode(metadata, path)
    check_sha256(path, checkpoint.tensors_sha256(tensors), facts.weights_sha256)
    return Deployed(facts, build(facts, tensors, model))


def read_onnx(path: Path) -> Deployed:
    """Read and verify an ONNX file."""
    import torch

    onnx, onnxruntime = require_onnx()
    content = path.read_bytes()
    with refused(f"{path} is not ONNX"):
        proto = onnx.load_model_from_string(content)
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
    facts = Facts.decode(metadata, path)
    check_sha256(path, graph_sha256(proto), metadata.get("graph_sha256", ""))
    with refused(f"{path} does not run"):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return Deployed(facts, lambda inputs: torch.from_numpy(session.run(None, {"inputs": inputs.numpy()})[0]))

"""Trained models ready to use: taken from a run directory, written to and read from one file of one of three formats.

Invariant: a file holds, beside the weights, what its inputs need (mean, std) and what its outputs mean (class names); it is
held against its SHA-256 before use, and nothing is unpickled. So the program inside a .pt2 runs only in the process that
wrote it: `torch.export.load` evaluates what it reads and may unpickle. For everyone else the weights are read out of it.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from train.config import ModelConfig
from train.errors import UserError
from train.functional import models
from train.functional.augment import normalize
from train.labels import class_names
from train.report import records
from train.storage import checkpoint
from train.storage.checkpoint import Damaged

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
FACTS_FILE = "lockstep.json"  # in a .pt2
PORTION = 500  # images per pass


@dataclass(frozen=True)
class Facts:
    """What a file says of itself; in safetensors and ONNX one metadata string per field, JSON where it is no string."""

    model: str
    data: str
    class_names: list[str]
    mean: float  # of the training pixels, 0..255: inputs = (images - mean) / std
    std: float
    weights: str  # raw, or ema: averaged
    weights_sha256: str
    step: int
    config: dict[str, Any]  # the trajectory config

    def encode(self) -> dict[str, str]:
        """As metadata strings."""
        values = dataclasses.asdict(self)
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}

    @classmethod
    def decode(cls, strings: dict[str, str], source: Path) -> "Facts":
        """From metadata strings; raises Damaged, naming what is missing."""
        types = get_type_hints(cls)
        try:
            values: Any = {name: strings[name] if types[name] is str else json.loads(strings[name]) for name in types}
            facts = cls(**values)
            facts.check()
            return facts
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise Damaged(f"{source} was not written by launch export: its metadata lack {_words(error)}.") from None

    def check(self) -> None:
        """Raise ValueError if a field is not what it must be."""
        names = self.class_names
        if self.model not in models.MODELS:
            raise ValueError(f"a known model (got {self.model!r:.40})")
        if (
            not isinstance(names, list)
            or len(names) != models.NUM_CLASSES
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"{models.NUM_CLASSES} class_names")
        if not (isinstance(self.mean, (int, float)) and isinstance(self.std, (int, float)) and 0 < self.std < 256):
            raise ValueError(f"mean and std of pixels (got {self.mean!r:.20}, {self.std!r:.20})")


@dataclass(frozen=True)
class Deployed:
    """A model that classifies: `logits` maps inputs float32 [B,1,28,28] to float32 [B,10], on the CPU."""

    facts: Facts
    logits: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Return logits float32 [N,10] of images uint8 or float [N,1,28,28] in 0..255."""
        inputs = normalize(images, self.facts.mean, self.facts.std)
        return torch.cat([self.logits(portion).float() for portion in inputs.split(PORTION)])


def _words(error: Exception) -> str:
    """The first line of an error, short."""
    return (" ".join(str(error).split()) or type(error).__name__)[:120]


def choose_checkpoint(run_dir: Path, notify: Callable[[str], None]) -> tuple[Path, checkpoint.Snapshot]:
    """Return a run's best checkpoint, or its newest whole one where the best is gone; raise UserError if there is none."""
    found = checkpoint.latest(run_dir / "checkpoints", notify)
    if found is None:
        raise UserError(f"{run_dir} has no checkpoint. Expected the directory of a run, such as runs/mnist.")
    path, state = found[0], checkpoint.decode(found[1])
    best = state.meta.get("best")
    if isinstance(best, dict) and isinstance(best.get("step"), int) and best["step"] != state.meta["step"]:
        try:
            path = run_dir / "checkpoints" / f"step-{best['step']:08d}"
            return path, checkpoint.decode(checkpoint.read(path))
        except Damaged as error:
            notify(f"{error} It was the best one; taking the newest.")
            path = found[0]
    return path, state


def from_run(
    run_dir: Path, notify: Callable[[str], None], weights: str | None = None, path: Path | None = None
) -> Deployed:
    """Take a model from a run directory: its best checkpoint or `path`, averaged weights if there are any or `weights`."""
    data_name = records.read(
        run_dir, run_dir.name
    ).data_name  # what was trained on: a fallback is not what the config says
    path, state = (path, checkpoint.decode(checkpoint.read(path))) if path else choose_checkpoint(run_dir, notify)
    weights = weights or ("ema" if state.ema else "raw")
    tensors = state.ema if weights == "ema" else state.model
    if not tensors:
        raise UserError(f"{path} has no averaged weights: the run's optim.ema is 0. Use --weights raw.")
    try:
        config, normalization = state.meta["trajectory"], state.meta["normalization"]
        facts = Facts(
            model=config["model.name"],
            data=data_name,
            class_names=class_names(data_name),
            mean=normalization["mean"],
            std=normalization["std"],
            weights=weights,
            weights_sha256=checkpoint.tensors_sha256(tensors),
            step=state.meta["step"],
            config=config,
        )
        facts.check()
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"Checkpoint {path} is not one of this program's: it lacks {_words(error)}.") from None
    return Deployed(facts, build(facts, tensors))


def build(facts: Facts, tensors: dict[str, Tensor]) -> nn.Module:
    """Build the model with these weights, ready to evaluate; raise Damaged if they are another model's."""
    module = models.build(ModelConfig(name=facts.model), 0).eval().requires_grad_(False)  # type: ignore[arg-type]
    checkpoint.restore_model(module, tensors)
    return module


def needs_onnx() -> Any:
    """Import onnx and onnxruntime and return both; raise UserError if one is missing."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(f'ONNX needs the package {error.name}: pip install "lockstep[export]".') from None
    return onnx, onnxruntime


def write(deployed: Deployed, kind: str, path: Path) -> None:
    """Write a model taken by `from_run` to a file of a format in SUFFIXES."""
    facts, module = deployed.facts, deployed.logits
    assert isinstance(module, nn.Module)
    if kind == "safetensors":
        path.write_bytes(safetensors.torch.save(checkpoint.model_tensors(module), facts.encode()))
        return
    options: Any = {"dynamic_shapes": {"inputs": {0: torch.export.Dim("batch")}}}
    example = (torch.zeros(2, 1, 28, 28),)  # 2: a batch of 1 would be fixed
    if kind == "torch-export":
        program = torch.export.export(module, example, **options)
        program._example_inputs = None  # the only part that torch would pickle
        torch.export.save(program, path, extra_files={FACTS_FILE: json.dumps(facts.encode())})
        return
    onnx, _ = needs_onnx()
    names: Any = {"input_names": ["inputs"], "output_names": ["logits"]}
    graph = torch.onnx.export(module, example, dynamo=True, verbose=False, **options, **names)
    assert graph is not None
    proto = graph.model_proto
    digest = hashlib.sha256(proto.graph.SerializeToString(deterministic=True)).hexdigest()
    onnx.helper.set_model_props(proto, facts.encode() | {"graph_sha256": digest})
    path.write_bytes(proto.SerializeToString())


def read(path: Path, *, own: bool = False) -> Deployed:
    """Read an exported file and verify it. Raises UserError, or Damaged, in one line.

    `own`: this process wrote the file, so the program inside a .pt2 may run.
    """
    readers = {".safetensors": _read_safetensors, ".pt2": _read_program if own else _read_archive, ".onnx": _read_onnx}
    if path.suffix not in readers:
        raise UserError(
            f"{path} is no model. Expected the directory of a run, or a file {', '.join(readers)} of launch export."
        )
    if not path.is_file():
        raise UserError(f"{path} is {'not a file' if path.exists() else 'missing'}. Expected what launch export wrote.")
    return readers[path.suffix](path)


def _verified(facts: Facts, tensors: dict[str, Tensor], path: Path) -> Deployed:
    found = checkpoint.tensors_sha256(tensors)
    if found != facts.weights_sha256:
        raise Damaged(
            f"{path} is damaged: its weights have SHA-256 {found[:12]}, expected {facts.weights_sha256[:12]}."
        )
    return Deployed(facts, build(facts, tensors))


def _read_safetensors(path: Path) -> Deployed:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise Damaged(f"{path} is not a whole safetensors file: {_words(error)}.") from None
    return _verified(Facts.decode(metadata, path), tensors, path)


def _read_archive(path: Path) -> Deployed:
    """Read weights and facts, not the program, out of a .pt2: a zip of raw tensors, described by JSON."""
    try:
        with zipfile.ZipFile(path) as archive:
            (root,) = {name.split("/")[0] for name in archive.namelist()}
            strings = json.loads(archive.read(f"{root}/extra/{FACTS_FILE}"))
            weights = f"{root}/data/weights"
            tensors = {}
            for name, entry in json.loads(archive.read(f"{weights}/model_weights_config.json"))["config"].items():
                meta = entry["tensor_meta"]
                sizes, strides = ([item["as_int"] for item in meta[key]] for key in ("sizes", "strides"))
                content = bytearray(archive.read(f"{weights}/{entry['path_name']}"))
                tensors[name] = torch.frombuffer(content, dtype=torch.float32).as_strided(sizes, strides).contiguous()
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        RecursionError,
        zipfile.BadZipFile,
    ) as error:
        raise Damaged(f"{path} is not a whole .pt2 of launch export: {_words(error)}.") from None
    return _verified(Facts.decode(strings, path), tensors, path)


def _read_program(path: Path) -> Deployed:
    """Load the program of a .pt2 that this process wrote."""
    weights = _read_archive(path)
    return Deployed(weights.facts, torch.export.load(path).module())


def _read_onnx(path: Path) -> Deployed:
    onnx, onnxruntime = needs_onnx()
    content = path.read_bytes()
    try:
        proto = onnx.load_model_from_string(content)
        props = {entry.key: entry.value for entry in proto.metadata_props}
    except Exception as error:  # protobuf's errors share no public class
        raise Damaged(f"{path} is not ONNX: {_words(error)}.") from None
    facts = Facts.decode(props, path)
    digest = hashlib.sha256(proto.graph.SerializeToString(deterministic=True)).hexdigest()
    if digest != props.get("graph_sha256"):
        raise Damaged(
            f"{path} is damaged: its graph has SHA-256 {digest[:12]}, expected {props.get('graph_sha256', '')[:12]}."
        )
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # nor do onnxruntime's
        raise Damaged(f"{path} does not run: {_words(error)}.") from None
    return Deployed(facts, lambda inputs: torch.from_numpy(session.run(None, {"inputs": inputs.numpy()})[0]))

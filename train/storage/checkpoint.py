"""Checkpoints: atomic, checksummed, verified before use, and without pickle.

`step-00000235/` is written in the writer's staging directory (`train.storage.lease`), every file and the directory synced, then
renamed: a name that exists is whole. Crash points: before the rename the next start removes the staging directory; after it
the checkpoint is complete. A writer without a staging directory has been replaced by another: all it tries fails.
Tensors are safetensors, the rest is JSON, `manifest.json` has each file's SHA-256. Only rank 0 touches the disk: what it
loads it broadcasts, so the run directory need not be shared. The world size is no part of the state.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from train import __version__
from train.errors import UserError

SCHEMA = 2
Files = dict[str, bytes]


class Damaged(UserError):
    """A checkpoint that does not verify; says which file and why."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's contents; tensors contiguous, on the CPU."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]
    meta: dict[str, Any]  # schema, step, trajectory, data_sha256, ledger, best, scaler, environment


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in the order of names: independent of device, layout and DDP."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as contiguous CPU tensors."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors, named `parameter/key`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


@torch.no_grad()
def restore_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy saved parameters and buffers into a model; raise Damaged if they are another model's.

    Not load_state_dict, which expects BatchNorm's step counter, that ours has not, in a dict without torch's metadata.
    """
    own = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if (saved := {name: tuple(tensor.shape) for name, tensor in tensors.items()}) != shapes:
        different = sorted(name for name in {*shapes, *saved} if shapes.get(name) != saved.get(name))
        raise Damaged(f"The checkpoint's tensors are not this model's: {', '.join(different[:3])} differ.")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put saved tensors back, each on its parameter's device and in its layout."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter, key = name.rsplit("/", 1)
        like = parameters[parameter]
        value = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor.to(like.device)
        optimizer.state[like][key] = value


def encode(saved: Snapshot) -> Files:
    """Return the bytes of each file. The same snapshot gives the same bytes."""
    files = {
        f"{name}.safetensors": safetensors.torch.save(tensors)
        for name, tensors in (("model", saved.model), ("optimizer", saved.optimizer), ("ema", saved.ema))
        if tensors
    }
    files["state.json"] = (json.dumps(saved.meta, indent=1, sort_keys=True) + "\n").encode()
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    files["manifest.json"] = (
        json.dumps({"schema": SCHEMA, "lockstep": __version__, "sha256": sums}, indent=1) + "\n"
    ).encode()
    return files


def decode(files: Files) -> Snapshot:
    """Return the snapshot that verified files hold."""
    empty = safetensors.torch.save({})
    tensors = {
        name: safetensors.torch.load(files.get(f"{name}.safetensors", empty)) for name in ("model", "optimizer", "ema")
    }
    return Snapshot(**tensors, meta=json.loads(files["state.json"]))


def read(path: Path) -> Files:
    """Read a checkpoint and verify each file against the manifest; raise Damaged, naming the file, otherwise."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["schema"] != SCHEMA:
            raise Damaged(f"Checkpoint {path} is of {writer(manifest)}; this version reads format {SCHEMA}.")
        sums = {str(name): str(promised) for name, promised in manifest["sha256"].items()}
        if missing := {"model.safetensors", "state.json"} - set(sums):
            raise Damaged(
                f"Checkpoint {path} is not whole: its manifest does not list {' and '.join(sorted(missing))}."
            )
        files = {name: (path / name).read_bytes() for name in sums if Path(name).name == name}
    except Damaged:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"Checkpoint {path} is not whole: {type(error).__name__} {error}.") from error
    for name, content in files.items():
        if (found := hashlib.sha256(content).hexdigest()) != sums[name]:
            raise Damaged(
                f"Checkpoint file {path / name} has SHA-256 {found[:12]}..., its manifest says {sums[name][:12]}..."
            )
        try:  # right checksums prove who wrote it, not that it can be read
            if name.endswith(".safetensors"):
                safetensors.torch.load(content)
            elif name == "state.json":
                json.loads(content)["step"]
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(f"Checkpoint file {path / name} cannot be read: {type(error).__name__} {error}.") from error
    return files


def writer(manifest: dict[str, Any]) -> str:
    """Return which version wrote a checkpoint, as far as its manifest says."""
    return f"format {manifest['schema']}, written by lockstep {manifest.get('lockstep', '0.1')}"


def is_whole(path: Path) -> bool:
    """Whether a checkpoint verifies."""
    try:
        read(path)
    except Damaged:
        return False
    return True


def step_of(path: Path) -> int | None:
    """The step in a checkpoint directory's name; None for other names."""
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match.group(1)) if match else None


def directories(checkpoints: Path) -> list[Path]:
    """The checkpoint directories, newest step first."""
    found = [path for path in checkpoints.glob("step-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def latest(checkpoints: Path, notify: Callable[[str], None]) -> tuple[Path, Files] | None:
    """Return the newest checkpoint that verifies; report those that do not and leave them alone. None: there is none.

    Raises UserError when there are checkpoints and not one of them is whole.
    """
    candidates = directories(checkpoints)
    for path in candidates:
        try:
            return path, read(path)
        except Damaged as error:
            notify(f"{error} It is left as it is; trying the one before.")
    if candidates:
        raise UserError(
            f"None of the {len(candidates)} checkpoints in {checkpoints} is whole. Nothing was deleted. "
            "Start anew with another run.name, or move them away."
        )
    return None


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(checkpoints: Path, step: int, files: Files, staging: Path) -> Path:
    """Write a checkpoint so that its name appears only when it is whole and on the disk; return its path.

    A whole checkpoint of the same step stays as it is. A damaged one is moved to `damaged-...`, never deleted.
    """
    final, temporary = checkpoints / f"step-{step:08d}", staging / f"step-{step:08d}"
    if final.exists() and is_whole(final):
        return final
    shutil.rmtree(temporary, ignore_errors=True)  # of a save that failed
    temporary.mkdir()
    try:
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync_directory(temporary)
    except OSError:  # a full disk: half a checkpoint would fill it further
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        names = (checkpoints / f"damaged-{final.name}-{number}" for number in itertools.count())
        final.rename(next(path for path in names if not path.exists()))
    temporary.rename(final)
    _sync_directory(checkpoints)
    return final


def prune(checkpoints: Path, keep: int, needed: set[int], staging: Path) -> None:
    """Delete all but the newest `keep` whole checkpoints and those of the steps in `needed`.

    Damaged ones neither count nor go: after a resume from an older checkpoint they are newer than the one just written.
    A directory is first moved to the staging directory: a kill in between leaves no half of a checkpoint under a good name.
    """
    for path in [path for path in directories(checkpoints) if is_whole(path)][keep:]:
        if step_of(path) not in needed:
            doomed = staging / f"pruned-{path.name}"
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

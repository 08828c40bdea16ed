"""Checkpoints: atomic, checksummed, verified before use, and without pickle.

`step-00000235/` is written in the writer's staging directory (`train.storage.lease`). Every file and the directory are
synced, then the directory is renamed, so a checkpoint that has its name is whole. After a crash before the rename, the
next start removes the staging directory. After the rename the checkpoint is complete. A writer that was replaced by
another attempt has no staging directory any more, so everything that it tries fails.

Tensors are safetensors, the rest is JSON, and `manifest.json` has each file's SHA-256. Only rank 0 uses the disk and
broadcasts what it loads, so the run directory need not be shared. The world size is not part of the state.
"""

import hashlib
import itertools
import json
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
from train.rundir import sync, sync_directory

SCHEMA = 3
PARTS = ("model", "optimizer", "ema")  # of a Snapshot, a safetensors file each
REQUIRED, OPTIONAL = {"model.safetensors", "state.json"}, {"optimizer.safetensors", "ema.safetensors"}
Files = dict[str, bytes]


class Damaged(UserError):
    """A checkpoint that fails verification, or that another version wrote. The message names it and the reason."""


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint. Its tensors are contiguous and on the CPU."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]
    meta: dict[str, Any]  # step, trajectory, sha256, data, ledger, best, scaler, environment


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes, in the order of names. Device and layout do not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = _on_cpu(tensor)
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers."""
    return {name: _on_cpu(tensor) for name, tensor in model.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return an optimizer's tensors, named `parameter/key`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": _on_cpu(torch.as_tensor(value))
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


@torch.no_grad()
def restore_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy saved parameters and buffers into a model. Raises Damaged if they do not fit.

    load_state_dict would refuse them: it expects a step counter of BatchNorm, which ours lacks.
    """
    own = model.state_dict()
    expected = {name: tensor.shape for name, tensor in own.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if different := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise Damaged(f"The checkpoint's tensors do not fit this model: {', '.join(different[:3])} differ.")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put saved tensors into an optimizer, each on its parameter's device and in its layout."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter, key = name.rsplit("/", 1)
        like = parameters[parameter]
        value = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor.to(like.device)
        optimizer.state[like][key] = value


def encode(saved: Snapshot) -> Files:
    """Return the bytes of each file of a checkpoint. The same snapshot gives the same bytes."""
    tensors = {f"{part}.safetensors": getattr(saved, part) for part in PARTS}
    files = {name: safetensors.torch.save(content) for name, content in tensors.items() if content}
    files["state.json"] = (json.dumps(saved.meta, indent=1, sort_keys=True) + "\n").encode()
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    manifest = {"schema": SCHEMA, "lockstep": __version__, "sha256": sums}
    return files | {"manifest.json": (json.dumps(manifest, indent=1) + "\n").encode()}


def decode(files: Files) -> Snapshot:
    """Return the snapshot in verified files."""
    empty = safetensors.torch.save({})
    model, optimizer, ema = (safetensors.torch.load(files.get(f"{part}.safetensors", empty)) for part in PARTS)
    return Snapshot(model, optimizer, ema, meta=json.loads(files["state.json"]))


def read(path: Path) -> Files:
    """Read a checkpoint and verify each file against the manifest. Raises Damaged."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["schema"] != SCHEMA:
            raise Damaged(
                f"Checkpoint {path} has format {manifest['schema']}, not {SCHEMA}: lockstep "
                f"{manifest.get('lockstep', '0.1')} wrote it. Continue with that version, or use another run.name."
            )
        sums = manifest["sha256"]
        if not REQUIRED <= set(sums) <= REQUIRED | OPTIONAL:
            raise Damaged(f"{path / 'manifest.json'} lists {sorted(sums)}, expected model.safetensors and state.json.")
        files = {name: (path / name).read_bytes() for name in sums}
        for name, content in files.items():
            if (found := hashlib.sha256(content).hexdigest()) != sums[name]:
                raise Damaged(f"Checkpoint file {path / name} has SHA-256 {found[:12]}, expected {sums[name]!s:.12}.")
        decode(files).meta["step"]  # a matching checksum does not prove that the content can be read
    except Damaged:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise Damaged(f"Checkpoint {path} is not whole: {type(error).__name__} {error}.") from error
    return files


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint verifies."""
    try:
        read(path)
    except Damaged:
        return False
    return True


def step_of(path: Path) -> int | None:
    """Return the step in a checkpoint directory's name, or None for other names."""
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match.group(1)) if match else None


def directories(checkpoints: Path) -> list[Path]:
    """Return the checkpoint directories, the newest step first."""
    found = [path for path in checkpoints.glob("step-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def latest(checkpoints: Path, notify: Callable[[str], None]) -> tuple[Path, Files] | None:
    """Return the newest checkpoint that verifies, or None if there are none. Report damaged ones and leave them alone.

    Raises UserError if there are checkpoints and none can be used.
    """
    problems = []
    for path in directories(checkpoints):
        try:
            return path, read(path)
        except Damaged as error:
            problems.append(str(error))
            notify(f"warning: {error}")
    if problems:
        raise UserError(
            f"None of the {len(problems)} checkpoints in {checkpoints} can be used. Nothing was deleted. "
            f"Start again with another run.name, or move them away. The oldest: {problems[-1]}"
        )
    return None


def write(checkpoints: Path, step: int, files: Files, staging: Path) -> Path:
    """Write a checkpoint and return its path. The path exists only once the checkpoint is whole and on the disk.

    A whole checkpoint of the same step is kept. A damaged one is moved to `damaged-...`, never deleted.
    """
    final, temporary = checkpoints / f"step-{step:08d}", staging / f"step-{step:08d}"
    if final.exists() and is_whole(final):
        return final
    shutil.rmtree(temporary, ignore_errors=True)  # left by a save that failed
    temporary.mkdir()
    try:
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                sync(file.fileno())
        sync_directory(temporary)
    except OSError:  # on a full disk, half a checkpoint would take up space
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        names = (checkpoints / f"damaged-{final.name}-{number}" for number in itertools.count())
        final.rename(next(path for path in names if not path.exists()))
    temporary.rename(final)
    sync_directory(checkpoints)
    return final


def prune(checkpoints: Path, keep: int, needed: set[int], staging: Path) -> None:
    """Delete all but the newest `keep` whole checkpoints and those of the steps in `needed`.

    Damaged checkpoints are neither counted nor deleted. After a resume from an older one they are newer than the one
    just written, and would push it out. A directory is moved to the staging directory before it is deleted, so that a
    kill in between leaves no half of a checkpoint under a valid name.
    """
    for path in [path for path in directories(checkpoints) if is_whole(path)][keep:]:
        if step_of(path) not in needed:
            doomed = staging / f"pruned-{path.name}"
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

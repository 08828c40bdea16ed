"""The environment fingerprint: the device, libraries and threads that a run computes with; and the commit of its code.

Two runs with equal config, data and fingerprint compute the same bits in exact mode. A checkpoint stores the
fingerprint, so that a resume can warn if it has changed (docs/exactness.md).
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import __version__
from train.functional.trajectory import differences

if TYPE_CHECKING:
    from train.world.world import World

# Variables that make libraries choose other kernels, as another processor would.
OTHER_KERNELS = ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR"]
OTHER_KERNELS += ["TORCH_BLAS_PREFER_CUBLASLT", "TORCH_CUDNN_V8_API_DISABLED"]


def versions(*packages: str) -> dict[str, str]:
    """Return {package: version}. Leave out packages without metadata, but not lockstep itself."""
    found = {}
    for package in packages:
        try:
            found[package] = __version__ if package == "lockstep" else version(package)
        except PackageNotFoundError:
            continue
    return found


def environment(world: World) -> dict[str, Any]:
    """Return the environment fingerprint of this rank. The number of threads is part of it on a CPU only."""
    import torch

    on_gpu = world.device.type == "cuda"
    libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if on_gpu else {}
    return {
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.machine(),
        "num_threads": None if on_gpu else world.num_threads,
        "variables": {name: os.environ[name] for name in OTHER_KERNELS if name in os.environ},
        "versions": versions("torch", "torchvision", "accelerate") | libraries,
    }


def environment_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what differs between two fingerprints, as `name before -> after`, for the names that both have."""
    first, second = ({**fingerprint, **fingerprint.get("versions", {})} for fingerprint in (before, after))
    common = (first.keys() & second.keys()) - {"versions"}
    return differences({name: first[name] for name in common}, {name: second[name] for name in common})


def git_commit() -> str | None:
    """Return the commit of the code that runs, with `+` if files differ from it; None outside a checkout."""
    # git distrusts a repository of another user, whose code runs here anyway
    git = ("git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent))
    describe = ("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+")
    try:
        return subprocess.run((*git, *describe), capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

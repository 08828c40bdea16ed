"""Check what the program does on one GPU, in one process: `python -m gpu.unit [--device cpu] GROUP ...`.

Nothing here needs a second GPU or a data set.
"""

import ctypes
import importlib.metadata
import importlib.util
import math
import sys
import typing
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu import buckets
from gpu.inside import EVERYTHING, FAST, FAST_995, Check, Lab, options, report
from train.cli import parse
from train.config import TrainConfig
from train.state import set_up
from train.step import train_step
from train.storage import data
from train.warmup import warm_up
from train.world.world import World

PRECISIONS: tuple[str, ...] = typing.get_args(typing.get_type_hints(TrainConfig)["precision"])
MAX_DIFFERENCE = 2e-4  # of a loss or gradient norm in fp32, relative, between a GPU and a CPU


def loaded_nccl() -> tuple[int, int, int]:
    """Return the version of the loaded NCCL. `torch.cuda.nccl.version()` is the one that torch was compiled with."""
    number = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    return number.value // 10000, number.value // 100 % 100, number.value % 100


def nccl_version() -> str:
    """Report the version of the loaded NCCL."""
    return ".".join(map(str, loaded_nccl()))


def facts(lab: Lab, packages: list[str]) -> dict[str, Any]:
    """Report versions, GPUs and missing packages."""
    versions = {"torch": torch.__version__, "accelerate": importlib.metadata.version("accelerate")}
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not lab.on_gpu:
        return {"ok": True, "versions": versions, "num_gpus": 0, "missing": missing}
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        return {"ok": False, "error": "torch sees no GPU. Use --device cpu for the dry run.", "versions": versions}
    versions |= {"cuda": torch.version.cuda or "", "cudnn": str(torch.backends.cudnn.version()), "nccl": nccl_version()}
    names = [torch.cuda.get_device_name(number) for number in range(num_gpus)]
    memory = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    found = {"versions": versions, "num_gpus": num_gpus, "gpus": names, "memory_gb": memory, "missing": missing}
    return {"ok": True, **found}


def sharing_nccl() -> dict[str, Any]:
    """Check that the loaded NCCL lets several ranks share a GPU, or that each rank has its own."""
    return {"ok": torch.cuda.device_count() > 1 or loaded_nccl() >= (2, 30), "nccl": nccl_version()}


def mode(lab: Lab, flags: str, *, exact: bool) -> dict[str, Any]:
    """Check that a mode runs with finite numbers, and in exact mode that a second run has the same bits."""
    steps = 6 if lab.on_gpu else 2
    flags = f"{flags} --train.num_micro_batches {4 if exact else 2} --train.exact {str(exact).lower()}"
    first = lab.train(flags, steps)
    is_finite = all(map(math.isfinite, first[0] + first[1]))
    if not exact:
        return {"ok": is_finite, "loss": round(first[0][-1], 4)}
    is_same = lab.train(flags, steps) == first
    return {"ok": is_finite and is_same, "same_bits": is_same, "loss": round(first[0][-1], 4)}


def modes(lab: Lab, name: str) -> list[Check]:
    """Return the checks of one model: every precision, exact and fast. tiny_bn also has one with everything on."""
    checks: list[Check] = []
    for precision in PRECISIONS if lab.on_gpu else ("bf16", "fp32"):
        for exact in (True, False):
            flags = f"--model.name {name} --train.precision {precision}"
            title = f"{name} {precision} {'exact' if exact else 'fast'}"
            checks.append((title, partial(mode, lab, flags, exact=exact)))
    if name == "cnn":
        nchw = "--model.name cnn --train.precision bf16 --train.channels_last false"
        checks.append(("cnn bf16 exact nchw", partial(mode, lab, nchw, exact=True)))
    if name == "tiny_bn":
        checks.append(("everything bf16 exact", partial(mode, lab, f"{EVERYTHING} --train.precision bf16", exact=True)))
    return checks


def parity(lab: Lab, flags: str) -> dict[str, Any]:
    """Check that the GPU computes in fp32 what the CPU computes, to round-off.

    With seed 0 the pooling of `cnn` has a tie that round-off breaks. In another memory layout even a CPU differs
    from itself by 1.5e-3.
    """
    flags, steps = f"{flags} --seed 1", 8 if lab.on_gpu else 2
    here, there = lab.train(flags, steps), lab.train(f"{flags} --train.device cpu", steps)
    worst = max(abs(a - b) / abs(b) for a, b in zip(here[0] + here[1], there[0] + there[1], strict=True))
    return {"ok": worst < MAX_DIFFERENCE, "worst_relative_difference": worst}


def graphs(lab: Lab, flags: str) -> dict[str, Any]:
    """Check that graphs have the bits of ordinary steps, across an epoch's short batch and into the next epoch."""
    flags += " --train.exact true --train.num_micro_batches 2 --train.cuda_graphs"
    config = parse(f"{lab.flags} {flags} on".split())
    world = World.open(config.train)
    try:
        plan, state = set_up(config, world, data.load(config.data, world))
        is_recorded = warm_up(plan, state, print) is not train_step
    finally:
        world.close()
    ordinary, graphed = (lab.train(f"{flags} {each}", 22) for each in ("off", "on"))
    differ = [number + 1 for number, (a, b) in enumerate(zip(ordinary[0], graphed[0], strict=True)) if a != b]
    return {
        "ok": is_recorded and ordinary == graphed,
        "recorded": is_recorded,
        "first_other_loss": differ[0] if differ else None,
    }


def waits(lab: Lab, flags: str) -> dict[str, Any]:
    """Check that no step waits for the GPU, even at the end of an epoch. torch raises where one would."""
    with lab.open(flags) as (_, _, make_step):
        for _ in range(5):
            make_step()
        lab.wait()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(15):
                make_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


def groups(lab: Lab, packages: list[str]) -> dict[str, Callable[[], list[Check]]]:
    """Return the checks of each group."""
    adamw = "--optim.name adamw --optim.lr 0.003"
    recipes = {
        "everything": EVERYTHING,
        "everything adamw": f"{EVERYTHING} {adamw}",
        "fast": FAST,
        "fast-99.5": FAST_995,
    }
    steps = {
        "fast ordinary": f"{FAST} --train.cuda_graphs off", "fast graph": f"{FAST} --train.cuda_graphs on",
        "everything ordinary": f"{EVERYTHING} --train.cuda_graphs off", "fast fp16": f"{FAST} --train.precision fp16",
    }  # fmt: skip
    in_fp32 = {"cnn": "--model.name cnn", "everything": EVERYTHING, "cnn adamw": f"--model.name cnn {adamw}"}
    return {
        "facts": lambda: [("facts", lambda: facts(lab, packages))],
        "nccl": lambda: [("nccl", sharing_nccl)],
        **{f"modes-{name}": partial(modes, lab, name) for name in ("cnn", "vgg", "tiny_bn")},
        "alignment": lambda: buckets.alignment_checks(lab),
        "hook": lambda: [("exact tree behind DDP", partial(buckets.hook, lab))],
        "parity": lambda: [
            (f"GPU against CPU, {name}", partial(parity, lab, flags)) for name, flags in in_fp32.items()
        ],
        "graphs": lambda: [(f"graphs, {name}", partial(graphs, lab, flags)) for name, flags in recipes.items()],
        "waits": lambda: [(f"no waiting, {name}", partial(waits, lab, flags)) for name, flags in steps.items()],
    }


def main(argv: list[str]) -> int:
    """Run the groups. Arguments after the group `facts` are packages to look for."""
    asked = options(argv)
    lab, names = Lab(asked.device), asked.groups
    packages = names[1:] if names[0] == "facts" else []
    made = groups(lab, packages)
    return report([check for name in (names[:1] if packages else names) for check in made[name]()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The trajectory config: the fields that decide the weights.

A resume must find them unchanged; two runs are compared by them.
"""

import dataclasses
import re
from typing import Any

from train.config import Config

# Changing one of these does not change the weights: whole sections, or single fields. (optim.nonfinite: until the first
# such step both policies do the same, and after it only `skip` continues.)
NOT_TRAJECTORY = {
    *("run", "eval", "checkpoint", "log", "wandb", "optim.nonfinite", "optim.max_skips"),
    *("data.name", "data.random_examples", "data.root", "data.download", "data.fallback", "data.eval_split"),
    "model.weights",  # as of the data, the SHA-256 of what it holds decides
    *("train.max_micro_batch_size", "train.cuda_graphs", "train.device", "train.num_threads", "train.timeout"),
    "train.profile_steps",
}


def trajectory(config: Config | dict[str, Any]) -> dict[str, Any]:
    """Return `{"section.field": value}` of the fields that decide the weights: what a resume must find unchanged.

    Takes a Config or what config.yaml holds.
    """
    flat: dict[str, Any] = {}
    for section, value in (config if isinstance(config, dict) else dataclasses.asdict(config)).items():
        for name, item in value.items() if isinstance(value, dict) else [(None, value)]:
            path = f"{section}.{name}" if name else section
            if section not in NOT_TRAJECTORY and path not in NOT_TRAJECTORY:
                flat[path] = item
    if isinstance(name := flat.get("model.name"), str):  # of FILE.py:FUNCTION, the file's content decides, not its path
        flat["model.name"] = re.sub(r".*\.py:", ":", name)
    return effective(flat)


def effective(flat: dict[str, Any]) -> dict[str, Any]:
    """Leave out the fields that have no effect next to the others."""
    unused = {
        "train.epochs": flat.get("train.max_steps"),
        "optim.beta2": flat.get("optim.name") == "sgd",
        "augment.erase_size": flat.get("augment.erase") == 0,
    }
    return {name: value for name, value in flat.items() if not unused.get(name)}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what differs between two flat mappings, as `name before -> after`."""
    names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    return [f"{name} {before.get(name)!r} -> {after.get(name)!r}" for name in names]

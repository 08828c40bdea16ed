"""Which config fields decide the weights: what a resume must find unchanged, and what two runs are compared by."""

import dataclasses
from typing import Any

from train.config import Config

# Changing one of these does not change the weights: whole sections, or single fields. (optim.nonfinite: until the first
# such step both policies do the same, and after it only skip goes on.)
NOT_MATHEMATICS = {
    *("run", "eval", "checkpoint", "log", "wandb", "optim.nonfinite", "optim.max_skips"),
    *("data.root", "data.download", "data.fallback"),
    *("train.micro_batch_limit", "train.cuda_graphs", "train.device", "train.num_threads", "train.timeout"),
    "train.profile_steps",
}


def mathematics(config: Config | dict[str, Any]) -> dict[str, Any]:
    """Return `{"section.field": value}` of the fields that decide the weights: what a resume must find unchanged.

    Takes a Config or what config.yaml holds.
    """
    flat: dict[str, Any] = {}
    for section, value in (config if isinstance(config, dict) else dataclasses.asdict(config)).items():
        for name, item in value.items() if isinstance(value, dict) else [(None, value)]:
            path = f"{section}.{name}" if name else section
            if section not in NOT_MATHEMATICS and path not in NOT_MATHEMATICS:
                flat[path] = item
    return flat


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two flat mappings, as `name before -> after`."""
    names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    return [f"{name} {before.get(name)!r} -> {after.get(name)!r}" for name in names]


def contract_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two runs' contracts, as `name before -> after`.

    A name that only one of them has does not count: older versions of this program recorded fewer.
    """
    first, second = ({**contract, **contract.get("versions", {})} for contract in (before, after))
    common = (first.keys() & second.keys()) - {"versions"}
    return differences({name: first[name] for name in common}, {name: second[name] for name in common})

"""Fingerprints: the bits of each step's loss (float64) and gradient norm (float32) in hex, as metrics.jsonl keeps them.

Invariant: nothing is rounded, so two computations of a step agree if and only if their texts do. A row holds the steps
`first` to `step`; each step of a run is in exactly one row. No torch: what was written can be read anywhere.
"""

import hashlib
import itertools
import math
import struct
from collections.abc import Iterable
from typing import Any

from train.errors import UserError

FORMATS = {"loss": ">d", "grad_norm": ">f"}  # struct's: big-endian float64 and float32
Bits = dict[int, str]  # step -> hex


def encode(name: str, value: float) -> str:
    """The bits of a value in hex: 16 digits of a loss, 8 of a gradient norm. A NaN has one kind of bits, whoever made it."""
    value = math.nan if math.isnan(value) else value
    return struct.pack(FORMATS[name], value).hex()


def decode(bits: str) -> float:
    """The value whose bits these are."""
    return struct.unpack(">d" if len(bits) == 16 else ">f", bytes.fromhex(bits))[0]


def ulps(bits: str, other: str) -> int:
    """How many floats lie from one value to another of the same width (0: the same; -0.0 and 0.0: the same)."""

    def rank(text: str) -> int:
        sign = 1 << (4 * len(text) - 1)
        number = int(text, 16)
        return number if number < sign else sign - number

    return abs(rank(bits) - rank(other))


def of_rows(rows: Iterable[dict[str, Any]]) -> dict[str, Bits]:
    """Collect `{"loss": {step: hex}, "grad_norm": ...}` from a run's rows; raise UserError where a step comes twice."""
    found: dict[str, Bits] = {name: {} for name in FORMATS}
    for row in rows:
        if row["event"] == "fingerprint":
            steps = range(row["first"], row["step"] + 1)
            for name, bits in found.items():
                if len(row[name]) != len(steps) or not bits.keys().isdisjoint(steps):
                    raise UserError(
                        f"The fingerprints of steps {steps.start} to {row['step']} are damaged: too few or doubled."
                    )
                bits.update(zip(steps, row[name], strict=True))
    return found


def receipt(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """What summary.json says of the fingerprints: first and last step, and a SHA-256 over all; None if there are none."""
    stretches = [row for row in rows if row["event"] == "fingerprint"]
    if not stretches:
        return None
    digest = hashlib.sha256()
    for row in stretches:
        for step, loss, norm in zip(itertools.count(row["first"]), row["loss"], row["grad_norm"], strict=False):
            digest.update(f"{step} {loss} {norm}\n".encode())
    return {"first": stretches[0]["first"], "last": stretches[-1]["step"], "sha256": digest.hexdigest()}

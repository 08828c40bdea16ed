"""Fingerprints: each step's loss and gradient norm as JSON numbers in metrics.jsonl, in exact mode.

Invariant: nothing is rounded. A loss is a float64, a gradient norm a float32, and Python writes either as the shortest
text that reads back as the same float. NaN and infinity are null. A row holds the steps `first` to `step`, and each
step of a run is in exactly one row. No torch: what was written can be read anywhere.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from train.errors import UserError
from train.rundir import Row

if TYPE_CHECKING:
    from train.functional.tables import StepResult

QUANTITIES = ("loss", "grad_norm")
Series = dict[int, float | None]  # step -> value, None if it is not finite


def encode(results: "Iterable[StepResult]") -> dict[str, list[float | None]]:
    """Return each step's loss and gradient norm as a row holds them."""
    values = {name: [getattr(result, name) for result in results] for name in QUANTITIES}
    return {name: [value if math.isfinite(value) else None for value in column] for name, column in values.items()}


def of_rows(rows: Iterable[Row]) -> dict[str, Series]:
    """Return `{"loss": {step: value}, "grad_norm": ...}` of a run's rows.

    Raises UserError if a step is missing or double.
    """
    found: dict[str, Series] = {name: {} for name in QUANTITIES}
    for row in rows:
        if row["event"] == "fingerprint":
            steps = range(row["first"], row["step"] + 1)
            for name, series in found.items():
                values = [value for value in row[name] if value is None or isinstance(value, float)]
                if len(values) != len(steps) or not series.keys().isdisjoint(steps):
                    raise UserError(
                        f"The fingerprints of steps {steps.start} to {row['step']} are damaged. Expected one per step."
                    )
                series.update(zip(steps, values, strict=True))
    return found


def receipt(rows: Iterable[Row]) -> dict[str, Any] | None:
    """Return the first and the last step that have fingerprints, and a SHA-256 over all of them; None without any.

    How steps are cut into rows does not count, so the receipt is the same on any world size.
    """
    stretches = [row for row in rows if row["event"] == "fingerprint"]
    if not stretches:
        return None
    digest = hashlib.sha256()
    for row in stretches:
        for step, loss, norm in zip(itertools.count(row["first"]), row["loss"], row["grad_norm"], strict=False):
            digest.update(json.dumps([step, loss, norm]).encode())
    return {"first": stretches[0]["first"], "last": stretches[-1]["step"], "sha256": digest.hexdigest()}


def difference(value: float | None, other: float | None) -> str:
    """Say how far two values are from each other. All their digits are shown."""
    if value is None or other is None:
        return f"{value} and {other} (None: not finite)"
    return f"{value} and {other}, {abs(value - other):.3g} apart"

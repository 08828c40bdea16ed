"""Random numbers without a stream: each is a hash of (purpose, step, row of the global batch, position), on any device.

Invariant: integer arithmetic only, so CPU and GPU, any micro-batching and any world size draw the same bits. There is no
state to save and nothing to skip; no global generator is ever read.
"""

import torch
from torch import Tensor

from train.functional.hashing import GOLDEN


def _signed(value: int) -> int:
    """The int64 with the same bits as a 64-bit unsigned value: torch has no uint64 arithmetic."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def mix64(values: Tensor) -> Tensor:
    """Scramble int64 values bijectively; the same bits as `hashing.mix64` (splitmix64's finalizer)."""

    def shift(bits: Tensor, count: int) -> Tensor:  # logical, where torch's >> on int64 is arithmetic
        return (bits >> count) & ((1 << (64 - count)) - 1)

    values = (values ^ shift(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ shift(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ shift(values, 31)


def row_keys(key: int | Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """Return one key, int64 [stop - start], per row [start, stop) of the global batch.

    `key` holds seed, purpose and step (`hashing.key`); as a tensor it is int64 [] with the same bits.
    """
    rows = torch.arange(start + 1, stop + 1, dtype=torch.int64, device=device)
    return mix64(rows * _signed(GOLDEN) + (key if isinstance(key, Tensor) else _signed(key)))


def uniform(keys: Tensor, num: int, salt: int = 0) -> Tensor:
    """Return float32 [B, num] in [0, 1), 24 random bits each, from row keys int64 [B]; `salt` tells layers apart."""
    columns = torch.arange(salt + 1, salt + num + 1, dtype=torch.int64, device=keys.device)
    bits = mix64(keys[:, None] + columns * _signed(GOLDEN))
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24

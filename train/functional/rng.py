"""Random numbers without a stream: each is a hash of (purpose, step, row of the global batch, position).

Invariant: only integer arithmetic decides the bits, so they are the same on CPU and GPU, for any micro-batches and any
world size. There is no state to save or to skip, and no global generator is read.
"""

import torch
from torch import Tensor

from train.functional.hashing import GOLDEN


def _signed(value: int) -> int:
    """Return the int64 with the same bits as an unsigned 64-bit value. Torch has no uint64 arithmetic."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def mix64(values: Tensor) -> Tensor:
    """Scramble int64 values bijectively, with the same bits as `hashing.mix64`."""

    def shift(bits: Tensor, count: int) -> Tensor:  # a logical shift; torch's >> on int64 is arithmetic
        return (bits >> count) & ((1 << (64 - count)) - 1)

    values = (values ^ shift(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ shift(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ shift(values, 31)


def row_keys(key: int | Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """Return a key for each row [start, stop) of the global batch, int64 [stop - start].

    `key` is the hash of seed, purpose and step (`hashing.key`), or an int64 [] tensor with the same bits.
    """
    rows = torch.arange(start + 1, stop + 1, dtype=torch.int64, device=device)
    return mix64(rows * _signed(GOLDEN) + (key if isinstance(key, Tensor) else _signed(key)))


def uniform(keys: Tensor, num: int, salt: int = 0) -> Tensor:
    """Return float32 [B, num] in [0, 1), 24 random bits each, from row keys int64 [B]. `salt` is the first column."""
    columns = torch.arange(salt + 1, salt + num + 1, dtype=torch.int64, device=keys.device)
    if torch.compiler.is_compiling():
        columns = columns ^ 0  # otherwise Inductor takes the product for an address, which must not overflow
    bits = mix64(keys[:, None] + columns * _signed(GOLDEN))
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24

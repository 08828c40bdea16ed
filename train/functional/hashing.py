"""64-bit hashes, the source of every random number of a run. Numpy only; `rng.py` has the same on a device."""

import hashlib

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: the increment of splitmix64


def key(seed: int, *names: str | int) -> int:
    """Hash a seed and the names of a purpose to 64 bits.

    With `seed + epoch`, two (seed, epoch) could share a stream. With a hash they do not.
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble uint64 values bijectively (splitmix64's finalizer; Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""Which examples a step uses: a function of (seed, step, rank, world_size), without state and without a DataLoader.

Invariant: a global batch has the same examples in the same order on any world size, and an epoch uses each example
exactly once. The order is a keyed bijection of [0, num_examples), evaluated index by index. Nothing is shuffled or
skipped, so a jump to any step of any epoch costs the same. For a small data set the order of the current epoch is
cached, which is faster than computing it batch by batch. Numpy only.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from train.functional.hashing import GOLDEN, key, mix64

ROUNDS = 8  # of the Feistel network; 4 suffice for large domains (Luby and Rackoff, 1988), small ones need more


def permute(positions: NDArray[np.uint64], num_examples: int, order_key: int) -> NDArray[np.uint64]:
    """Map positions in [0, num_examples) to examples by a bijection that `order_key` selects.

    A Feistel network permutes the next power of four. A result outside [0, num_examples) is permuted again until it is
    inside (cycle walking; Black and Rogaway, 2002), fewer than four times on average.
    """
    half = np.uint64(max(1, (max(num_examples - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = mix64(np.uint64(order_key) + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(GOLDEN))

    def encrypt(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> half, values & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right + round_key) & mask)
        return (left << half) | right

    examples = encrypt(positions)
    while (outside := examples >= num_examples).any():
        examples[outside] = encrypt(examples[outside])
    return examples


@lru_cache(maxsize=1)
def epoch_order(num_examples: int, order_key: int) -> NDArray[np.uint64]:
    """Return a whole epoch's order, uint64 [num_examples]. The last result is cached."""
    return permute(np.arange(num_examples, dtype=np.uint64), num_examples, order_key)


def share(num_items: int, num_parts: int, part: int) -> tuple[int, int]:
    """Return [start, stop) of one of `num_parts` contiguous parts of `num_items`. Their sizes differ by at most one."""
    return num_items * part // num_parts, num_items * (part + 1) // num_parts


@dataclass(frozen=True)
class Sampler:
    """The order of examples of a whole run."""

    num_examples: int  # of the training split
    global_batch_size: int
    num_micro_batches: int  # of a step
    seed: int
    kept_examples: int = 1 << 20  # the order of a larger split is computed batch by batch, to save 8 bytes per example

    @property
    def steps_per_epoch(self) -> int:
        """The steps that use each example once. The last one may be shorter."""
        return -(-self.num_examples // self.global_batch_size)

    def batch_rows(self, step: int) -> int:
        """Return the number of examples in the global batch of `step`."""
        start = step % self.steps_per_epoch * self.global_batch_size
        return min(self.global_batch_size, self.num_examples - start)

    def is_whole(self, step: int) -> bool:
        """Return whether the global batch of `step` has its full size. All have, except possibly an epoch's last."""
        return self.batch_rows(step) == self.global_batch_size

    def micro_batch(self, step: int, index: int) -> tuple[int, int]:
        """Return the rows [start, stop) of the global batch in micro-batch `index`, possibly none."""
        return share(self.batch_rows(step), self.num_micro_batches, index)

    def own_micro_batches(self, rank: int, world_size: int) -> range:
        """Return the contiguous block of micro-batches that a rank computes. With too many ranks some are empty."""
        return range(*share(self.num_micro_batches, world_size, rank))

    def examples(self, step: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the examples, int64 [stop - start], in rows [start, stop) of the global batch of `step`."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        first, order_key = batch * self.global_batch_size, key(self.seed, "order", epoch)
        if self.num_examples <= self.kept_examples:
            return epoch_order(self.num_examples, order_key)[first + start : first + stop].astype(np.int64)
        positions = first + np.arange(start, stop, dtype=np.uint64)
        return permute(positions, self.num_examples, order_key).astype(np.int64)

    def rank_rows(self, step: int, rank: int, world_size: int) -> tuple[int, int]:
        """Return the rows [start, stop) of the global batch of `step` that a rank's micro-batches cover."""
        own = self.own_micro_batches(rank, world_size)
        return self.micro_batch(step, own.start)[0], self.micro_batch(step, own.stop)[0]

    def rank_examples(self, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """Return the examples, int64 [n], that a rank uses in a step."""
        return self.examples(step, *self.rank_rows(step, rank, world_size))


def coverage_checksum(examples: NDArray[np.int64]) -> int:
    """Return the sum of the examples' hashes mod 2**64, in any order. Different multisets almost never agree."""
    return int(mix64(examples.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(1)).sum(dtype=np.uint64))


def expected_coverage(num_examples: int, chunk_size: int) -> tuple[int, int]:
    """Return (coverage checksum, count) of an epoch that uses each example once, computed in chunks."""
    starts = range(0, num_examples, chunk_size)
    chunks = (np.arange(start, min(start + chunk_size, num_examples)) for start in starts)
    return sum(map(coverage_checksum, chunks)) % 2**64, num_examples

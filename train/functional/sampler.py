"""Which examples a step uses: a pure function of (seed, step, rank, world_size), without state and without a DataLoader.

Invariant: global batch k of an epoch is the same set of examples, in the same order, on any world size, and an epoch uses
each example exactly once. The order is a keyed bijection of [0, num_examples), evaluated index by index, so any step of
any epoch of any data set costs the same: nothing is shuffled or skipped. Of a small data set the order of the current epoch
is kept, which is faster than to compute it batch by batch. Numpy only: no torch, no ranks' state.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from train.functional.hashing import GOLDEN, key, mix64

ROUNDS = 8  # of the Feistel network; 4 are secure for large domains (Luby and Rackoff, 1988), small ones want more


def permute(positions: NDArray[np.uint64], num_examples: int, order_key: int) -> NDArray[np.uint64]:
    """Map positions in [0, num_examples) to examples by a bijection that `order_key` selects.

    A Feistel network permutes the next power of four; positions that land outside [0, num_examples) walk on along
    their cycle until they are inside (cycle walking; Black and Rogaway, 2002), fewer than four times on average.
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
    """Return a whole epoch's order, uint64 [num_examples]; the last one asked for is kept."""
    return permute(np.arange(num_examples, dtype=np.uint64), num_examples, order_key)


def share(num_items: int, num_parts: int, part: int) -> tuple[int, int]:
    """Return [start, stop) of one of `num_parts` contiguous parts of `num_items`, whose sizes differ by at most one."""
    return num_items * part // num_parts, num_items * (part + 1) // num_parts


@dataclass(frozen=True)
class Sampler:
    """The order of examples of a whole run.

    Args: `num_examples` of the training split; `global_batch_size` in examples; `micro_batches` per step; `seed`; the order of
    up to `kept_examples` is kept in memory (8 bytes each), that of a larger split is computed for each batch anew.
    """

    num_examples: int
    global_batch_size: int
    micro_batches: int
    seed: int
    kept_examples: int = 1 << 20

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each example is used once; the last one may be shorter."""
        return -(-self.num_examples // self.global_batch_size)

    def batch_rows(self, step: int) -> int:
        """Examples in the global batch of `step`."""
        start = step % self.steps_per_epoch * self.global_batch_size
        return min(self.global_batch_size, self.num_examples - start)

    def is_whole(self, step: int) -> bool:
        """Whether the global batch of `step` has its full size, as all but an epoch's last one do."""
        return self.batch_rows(step) == self.global_batch_size

    def micro_batch(self, step: int, index: int) -> tuple[int, int]:
        """Return the rows [start, stop) of the global batch that are micro-batch `index`; none in a tiny last batch."""
        return share(self.batch_rows(step), self.micro_batches, index)

    def own_micro_batches(self, rank: int, world_size: int) -> range:
        """The contiguous block of micro-batches that a rank computes; empty for a rank too many."""
        return range(*share(self.micro_batches, world_size, rank))

    def examples(self, step: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the examples, int64 [stop - start], in the rows [start, stop) of the global batch of `step`."""
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


def ledger_sum(examples: NDArray[np.int64]) -> int:
    """Fold examples into an order-free 64-bit sum (mod 2**64): equal multisets have equal sums, others almost never."""
    return int(mix64(examples.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(1)).sum(dtype=np.uint64))


def expected_ledger(num_examples: int, positions: int) -> tuple[int, int]:
    """Return (ledger sum, count) of an epoch in which each of `num_examples` was used once; `positions` per portion."""
    total = 0
    for start in range(0, num_examples, positions):
        total += ledger_sum(np.arange(start, min(start + positions, num_examples)))
    return total % 2**64, num_examples

"""The sampler uses each example once, in an order that looks random and is the same on any world size."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from train.config import Config
from train.functional.hashing import key, mix64
from train.functional.sampler import Sampler, coverage_checksum, expected_coverage, permute, share
from train.functional.tables import StepTables

PINNED = ([9306, 53218, 21082, 21579], [54210, 22312, 48372, 26207])  # the first rows of epochs 0 and 1 of seed 0
WORLD_SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 60, 64, 100, 1000, 4095, 4096)


def epoch_examples(sampler: Sampler, epoch: int) -> NDArray[np.int64]:
    """Return an epoch's examples in their order."""
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    return np.concatenate([sampler.examples(step, 0, sampler.batch_rows(step)) for step in steps])


def correlation(left: NDArray, right: NDArray) -> float:
    return float(np.corrcoef(left, right)[0, 1])


@given(size=st.integers(1, 700), batch=st.integers(1, 800), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_epoch_uses_each_example_exactly_once(size: int, batch: int, seed: int, epoch: int) -> None:
    sampler = Sampler(size, batch, 1, seed)
    assert np.array_equal(np.sort(epoch_examples(sampler, epoch)), np.arange(size))


@given(size=st.integers(1, 700), batch=st.integers(1, 300), step=st.integers(0, 10**6), seed=st.integers(0, 2**70))
@settings(deadline=None, max_examples=50)
def test_cached_order_is_the_computed_one(size: int, batch: int, step: int, seed: int) -> None:
    kept, computed = Sampler(size, batch, 1, seed), Sampler(size, batch, 1, seed, kept_examples=0)
    rows = kept.batch_rows(step)
    assert np.array_equal(kept.examples(step, 0, rows), computed.examples(step, 0, rows))
    assert np.array_equal(kept.examples(step, rows // 2, rows), computed.examples(step, rows // 2, rows))


@given(size=st.integers(1, 3000), order_key=st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=100)
def test_permute_is_a_bijection(size: int, order_key: int) -> None:
    found = permute(np.arange(size, dtype=np.uint64), size, order_key)
    assert np.array_equal(np.sort(found), np.arange(size, dtype=np.uint64))


@given(size=st.integers(1, 2**62), order_key=st.integers(0, 2**64 - 1), data=st.data())
@settings(deadline=None, max_examples=100)
def test_permute_of_one_position_is_that_of_many(size: int, order_key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8)), dtype=np.uint64)
    together = permute(positions, size, order_key)
    assert (together < size).all()
    assert [int(permute(positions[i : i + 1], size, order_key)[0]) for i in range(len(positions))] == together.tolist()
    assert len(set(together.tolist())) == len(set(positions.tolist()))


@given(
    size=st.integers(1, 300),
    batch=st.integers(1, 64),
    world_size=st.integers(1, 16),
    extra=st.integers(0, 9),
    step=st.integers(0, 10**9),
)
@settings(deadline=None, max_examples=200)
def test_ranks_share_a_global_batch_without_gap_or_overlap(
    size: int, batch: int, world_size: int, extra: int, step: int
) -> None:
    sampler = Sampler(size, batch, world_size + extra, seed=0)
    whole = sampler.examples(step, 0, sampler.batch_rows(step))
    parts = [sampler.rank_examples(step, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert len(np.unique(whole)) == len(whole) == sampler.batch_rows(step)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("step", [0, 3, 15])  # the first, a middle one, and the short last of an epoch
def test_global_batch_is_the_same_at_every_world_size(world_size: int, step: int) -> None:
    sampler = Sampler(60_000, 4096, 4096, seed=5)
    alone = sampler.rank_examples(step, 0, 1)
    ranks = range(world_size) if world_size < 1000 else range(0, world_size, world_size // 50)
    bounds = {
        rank: [sampler.micro_batch(step, i) for i in sampler.own_micro_batches(rank, world_size)] for rank in ranks
    }
    for rank, parts in bounds.items():
        own = sampler.rank_examples(step, rank, world_size)
        assert np.array_equal(own, alone[parts[0][0] : parts[-1][1]])
    if world_size < 1000:
        assert np.array_equal(np.concatenate([sampler.rank_examples(step, rank, world_size) for rank in ranks]), alone)


def test_share_cuts_without_gap_at_every_world_size_to_4096() -> None:
    for world_size in range(1, 4097):
        starts, stops = share(4096, world_size, np.arange(world_size))  # type: ignore[arg-type]
        assert starts[0] == 0
        assert stops[-1] == 4096
        assert np.array_equal(starts[1:], stops[:-1])
        sizes = stops - starts
        assert sizes.min() >= 1
        assert sizes.max() - sizes.min() <= 1


def test_ranks_without_micro_batches_get_no_examples() -> None:
    sampler = Sampler(100, 10, 2, seed=0)
    parts = [sampler.rank_examples(4, rank, 5) for rank in range(5)]
    assert sorted(len(part) for part in parts) == [0, 0, 0, 5, 5]
    assert np.array_equal(np.concatenate(parts), sampler.examples(4, 0, 10))


@pytest.mark.parametrize(
    ("size", "batch", "rows"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 8, [3]), (1, 1, [1]), (9, 4, [4, 4, 1])]
)
def test_last_batch_has_the_remaining_examples(size: int, batch: int, rows: list[int]) -> None:
    sampler = Sampler(size, batch, 4, seed=1)
    assert sampler.steps_per_epoch == len(rows)
    for epoch in (0, 3):
        steps = [epoch * len(rows) + i for i in range(len(rows))]
        assert [sampler.batch_rows(step) for step in steps] == rows
        for step in steps:
            cuts = [sampler.micro_batch(step, index) for index in range(4)]
            assert cuts[0][0] == 0
            assert cuts[-1][1] == sampler.batch_rows(step)
            assert all(left[1] == right[0] for left, right in itertools.pairwise(cuts))


def test_order_differs_by_epoch_and_by_seed() -> None:
    orders = {
        (seed, epoch): epoch_examples(Sampler(200, 50, 1, seed), epoch) for seed in (0, 1, 42, 43) for epoch in range(5)
    }
    assert len({order.tobytes() for order in orders.values()}) == len(orders)
    assert not np.array_equal(orders[42, 1], orders[43, 0])
    assert not any(np.array_equal(order, np.arange(200)) for order in orders.values())


def test_order_is_pinned() -> None:
    """If these numbers change, the result of every run changes."""
    sampler = Sampler(60_000, 512, 8, seed=0)
    assert sampler.examples(0, 0, 4).tolist() == PINNED[0]
    assert sampler.examples(118, 0, 4).tolist() == PINNED[1]


def test_jump_to_any_step_costs_the_same() -> None:
    sampler = Sampler(10**12, 1024, 8, seed=0)
    began = time.perf_counter()
    for step in (0, 10**8, 10**9 - 1, 10**15):
        found = sampler.examples(step, 0, sampler.batch_rows(step))
        assert len(np.unique(found)) == len(found) == sampler.batch_rows(step)
        assert found.min() >= 0
        assert found.max() < 10**12
        assert found.max() - found.min() > 9 * 10**11  # from everywhere, not from a window
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("size", [2, 3, 4, 5, 10, 16, 33])
def test_permute_puts_every_example_everywhere_equally_often(size: int) -> None:
    """Chi-square of the table position x example over keys, (size - 1)**2 degrees of freedom, within 4 sigma."""
    num_keys = 2000
    table = np.zeros((size, size))
    positions = np.arange(size, dtype=np.uint64)
    for number in range(num_keys):
        table[np.arange(size), permute(positions, size, key(number, "chi")).astype(int)] += 1
    expected = num_keys / size
    statistic = ((table - expected) ** 2 / expected).sum() * (size - 1) / size
    freedom = (size - 1) ** 2
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5 + 4


def test_permute_selects_every_order_of_three_equally_often() -> None:
    num_keys = 3000
    orders = [
        tuple(permute(np.arange(3, dtype=np.uint64), 3, key(number, "six")).tolist()) for number in range(num_keys)
    ]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 6
    assert sum((count - num_keys / 6) ** 2 / (num_keys / 6) for count in counts) < 20.5  # p = 0.001 at 5 degrees


@pytest.mark.parametrize("size", [1000, 4096, 60_000])
def test_permute_does_not_correlate_with_its_neighbours(size: int) -> None:
    positions = np.arange(size, dtype=np.uint64)
    first, second = (permute(positions, size, key(seed, "order", 0)).astype(float) for seed in (0, 1))
    limit = 4 / size**0.5
    assert abs(correlation(first[:-1], first[1:])) < limit
    assert abs(correlation(positions.astype(float), first)) < limit
    assert abs(correlation(first, second)) < limit
    steps = np.abs(np.diff(first))
    assert abs(steps.mean() - size / 3) < 4 * size * (1 / 18) ** 0.5 / size**0.5 * 1.2
    assert (steps == 1).sum() < 2 + 4 * 2**0.5 + 2


def test_mix64_is_splitmix64() -> None:
    """The first outputs of splitmix64 seeded with 0, as its authors publish them."""
    state = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [f"{value:016x}" for value in mix64(state).tolist()] == [
        "e220a8397b1dcdaf",
        "6e789e6aa1b965f4",
        "06c45d188009454f",
    ]


def test_key_tells_seed_purpose_and_epoch_apart() -> None:
    names = [
        (seed, purpose, number)
        for seed in (0, 1, 10, 2**64)
        for purpose in ("order", "augment")
        for number in range(50)
    ]
    assert len({key(*name) for name in names}) == len(names)
    assert all(0 <= key(*name) < 2**64 for name in names)


@given(size=st.integers(2, 500), data=st.data())
def test_coverage_checksum_finds_one_doubled_and_one_missing(size: int, data: st.DataObject) -> None:
    doubled = data.draw(st.integers(0, size - 1))
    missing = data.draw(st.integers(0, size - 1).filter(lambda number: number != doubled))
    examples = np.arange(size)
    expected, count = expected_coverage(size, 64)
    assert (coverage_checksum(np.random.default_rng(0).permutation(examples)), size) == (expected, count)
    examples[missing] = doubled
    assert coverage_checksum(examples) != expected


@given(size=st.integers(1, 2000), chunk_size=st.integers(1, 2500))
def test_coverage_checksum_adds_up_over_chunks_of_any_size(size: int, chunk_size: int) -> None:
    assert expected_coverage(size, chunk_size) == (coverage_checksum(np.arange(size)), size)


@settings(deadline=None, max_examples=300)
@given(size=st.integers(1, 40), batch=st.integers(1, 12), world_size=st.integers(1, 8), data=st.data())
def test_tables_hold_the_examples_of_every_rank_in_every_step(
    size: int, batch: int, world_size: int, data: st.DataObject
) -> None:
    """A rank may have more rows of a shorter last batch than of a whole one: 8 rows on 5 ranks, then 7."""
    sampler = Sampler(size, batch, data.draw(st.sampled_from([min(batch, world_size), batch])), 0)
    steps, cpu = sampler.steps_per_epoch, torch.device("cpu")
    found: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(world_size):
        tables = StepTables(
            Config(), sampler, steps, 0, rank, world_size, cpu, loss_scale=1.0, has_dropout=False, has_scaler=False
        )
        for step in range(steps):
            if not tables.start <= step < tables.stop:
                tables.fill(step)
            start, stop = sampler.rank_rows(step, rank, world_size)
            found[step] += tables.rows[step - tables.start, : stop - start].tolist()
    for step in range(steps):
        assert found[step] == sampler.examples(step, 0, sampler.batch_rows(step)).tolist()

"""Random bits depend on (key, row, column) alone, are the same as numpy's, and are uniform."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.functional import hashing
from train.functional.rng import mix64, row_keys, uniform

PINNED = [[12744771, 3692426], [11102799, 8369788]]  # seed 0, step 0, rows 0 and 1
CPU = torch.device("cpu")


def test_mix64_gives_numpys_bits() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    values[:4] = [0, 1, 2**63, 2**64 - 1]
    found = mix64(torch.from_numpy(values.view(np.int64))).numpy().view(np.uint64)
    assert np.array_equal(found, hashing.mix64(values))


@given(key=st.integers(0, 2**64 - 1), start=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 40), max_size=3))
def test_row_keys_do_not_depend_on_how_the_batch_is_cut(key: int, start: int, cuts: list[int]) -> None:
    whole = row_keys(key, start, start + 40, CPU)
    bounds = [0, *sorted(cuts), 40]
    parts = [row_keys(key, start + a, start + b, CPU) for a, b in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.cat([uniform(part, 3) for part in parts]), uniform(whole, 3))
    assert len(whole.unique()) == 40


def test_row_keys_are_numpys() -> None:
    rows = np.arange(1, 9, dtype=np.uint64) * np.uint64(hashing.GOLDEN)
    expected = hashing.mix64(rows + np.uint64(2**64 - 5))
    assert row_keys(2**64 - 5, 0, 8, CPU).numpy().view(np.uint64).tolist() == expected.tolist()


def test_uniform_is_pinned() -> None:
    """If these numbers change, the result of every run changes."""
    found = uniform(row_keys(hashing.key(0, "augment", 0), 0, 2, CPU), 2) * 2**24
    assert found.to(torch.int64).tolist() == PINNED


def test_uniform_is_uniform() -> None:
    values = uniform(row_keys(hashing.key(1, "test"), 0, 4000, CPU), 25).double()
    assert values.dtype == torch.float64
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    counts = torch.histc(values, 50, 0, 1)
    statistic = float(((counts - 2000) ** 2 / 2000).sum())
    assert abs(statistic - 49) < 4 * (2 * 49) ** 0.5
    assert abs(float(values.mean()) - 0.5) < 4 * (1 / 12 / 100_000) ** 0.5
    bits = (values * 2**24).long()
    for bit in range(24):  # every one of the 24 bits is fair
        assert abs(float((bits >> bit & 1).double().mean()) - 0.5) < 4.5 * 0.5 / 100_000**0.5, bit


def test_uniform_stays_below_one_when_it_is_scaled_to_integers() -> None:
    largest = torch.tensor([1 - 2.0**-24])
    for count in range(1, 4097):
        assert int((largest * count).long()) == count - 1


@pytest.mark.parametrize("lag", [1, 2, 7])
def test_uniform_rows_and_columns_are_independent(lag: int) -> None:
    values = uniform(row_keys(hashing.key(2, "test"), 0, 3000, CPU), 30).numpy()
    limit = 4 / values.size**0.5
    assert abs(np.corrcoef(values[:-lag].ravel(), values[lag:].ravel())[0, 1]) < limit * 1.1
    assert abs(np.corrcoef(values[:, :-lag].ravel(), values[:, lag:].ravel())[0, 1]) < limit * 1.2


def test_uniform_salts_steps_and_purposes_draw_other_numbers() -> None:
    keys = row_keys(hashing.key(0, "augment", 0), 0, 100, CPU)
    others = [row_keys(hashing.key(0, *name), 0, 100, CPU) for name in (("augment", 1), ("dropout", 0))]
    drawn = [uniform(keys, 4, salt) for salt in (0, 8, 16)] + [uniform(other, 4) for other in others]
    for number, left in enumerate(drawn):
        for right in drawn[:number]:
            assert (left == right).float().mean() < 0.01
    assert torch.equal(uniform(keys, 12)[:, 8:], uniform(keys, 4, 8))  # a salt is an offset of columns


def test_rng_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state()
    uniform(row_keys(1, 0, 10, CPU), 3)
    assert torch.equal(torch.get_rng_state(), before)

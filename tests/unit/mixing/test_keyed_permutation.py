"""Keyed permutations: bijective, random access, and random enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rewarm.mixing.permutation import MAX_SIZE, KeyedPermutation, order_key


@given(st.integers(1, 5000), st.binary(min_size=1, max_size=20))
def test_every_value_once(size: int, key: bytes) -> None:
    values = KeyedPermutation(size, key)(np.arange(size))
    assert (np.sort(values) == np.arange(size)).all()


@given(st.integers(2**40, MAX_SIZE), st.integers(0, 2**40 - 100))
def test_large_sizes_stay_inside_and_do_not_collide(size: int, start: int) -> None:
    values = KeyedPermutation(size, b"key")(np.arange(start, start + 100))
    assert values.min() >= 0 and values.max() < size
    assert len(np.unique(values)) == 100


def test_access_in_any_order_gives_the_same() -> None:
    permutation = KeyedPermutation(1000, b"key")
    whole = permutation(np.arange(1000))
    places = np.array([999, 3, 500, 3])
    assert (permutation(places) == whole[places]).all()
    assert permutation(np.arange(0)).shape == (0,)


def test_small_permutations_are_all_equally_likely() -> None:
    orders = [tuple(KeyedPermutation(4, order_key(0, "d", e))(np.arange(4)).tolist()) for e in range(4800)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("size", [100, 1000, 65536, 100_000])
def test_order_is_free_of_trend_and_neighbours(size: int) -> None:
    values = KeyedPermutation(size, order_key(1, "d", 0))(np.arange(size)).astype(float)
    bound = 4.5 / np.sqrt(size)
    assert abs(np.corrcoef(values, np.arange(size))[0, 1]) < bound
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < bound
    first_half = np.histogram(values[: size // 2], bins=10, range=(0, size))[0]
    assert stats.chisquare(first_half).pvalue > 1e-5


def test_epochs_seeds_and_domains_have_orders_of_their_own() -> None:
    keys = [order_key(0, "d", 0), order_key(0, "d", 1), order_key(1, "d", 0), order_key(0, "e", 0)]
    orders = [KeyedPermutation(10_000, key)(np.arange(10_000)) for key in keys]
    for index, order in enumerate(orders):
        for other in orders[:index]:
            assert (order == other).sum() < 10  # one fixed point is expected, ten have odds of 1e-7

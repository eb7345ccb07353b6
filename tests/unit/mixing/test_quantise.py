"""Integer weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.errors import UserError
from rewarm.mixing.weights import TOTAL, align, fractions, quantise

mixtures = st.lists(st.floats(0, 1e300, allow_nan=False), min_size=1, max_size=60).filter(lambda w: max(w) > 0)


@given(mixtures)
def test_they_sum_to_2_to_the_32_and_are_nearest(weights: list[float]) -> None:
    counts = quantise(weights)
    assert counts.dtype == np.int64 and int(counts.sum()) == TOTAL
    scale = max(weights)
    shares = np.array([w / scale for w in weights]) / math.fsum(w / scale for w in weights) * TOTAL
    assert np.abs(counts - shares).max() <= len(weights) + 1
    assert all((count > 0) == (weight > 0) for count, weight in zip(counts, weights, strict=True))


@given(mixtures)
def test_what_is_quantised_stays(weights: list[float]) -> None:
    once = quantise(weights)
    assert (quantise(once) == once).all()
    assert (quantise(fractions(once)) == once).all()


def test_equal_remainders_go_to_the_lower_index() -> None:
    # 2^32 = 3 * 1431655765 + 1
    assert quantise([1, 1, 1]).tolist() == [1431655766, 1431655765, 1431655765]


def test_a_tiny_weight_is_taken_from_the_largest() -> None:
    assert quantise([1e-300, 1.0, 2.0]).tolist() == [1, 1431655765, 2863311530]
    assert quantise([0.0, 1.0]).tolist() == [0, TOTAL]


@pytest.mark.parametrize("bad", [math.nan, -0.1, math.inf])
def test_a_bad_weight_is_named(bad: float) -> None:
    with pytest.raises(UserError, match=f"number 1 is {bad}"):
        quantise([1.0, bad])


def test_weights_of_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="sum to 0"):
        quantise([0.0, 0.0])
    with pytest.raises(UserError, match="no domains"):
        quantise([])


def test_align_names_what_does_not_fit() -> None:
    assert align({"b": 2, "a": 1}, ["a", "b"]).tolist() == [1, 2]
    with pytest.raises(UserError, match=r"only in the weights \['c'\], only in the domains \['b'\]"):
        align({"a": 1, "c": 2}, ["a", "b"])

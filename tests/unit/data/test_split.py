"""Duplicates and the held-out side, against plain Python."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rewarm.data.split import first_occurrences, is_held_out, text_hash


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_first_occurrences(pairs: list[tuple[int, int]]) -> None:
    hashes = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    assert first_occurrences(hashes).tolist() == [pair not in pairs[:i] for i, pair in enumerate(pairs)]


def test_held_out_share_of_many_texts() -> None:
    raw = b"".join(text_hash(str(i).encode()) for i in range(20_000))
    hashes = np.frombuffer(raw, ">u8").astype(np.uint64).reshape(-1, 2)
    small, large = is_held_out(hashes, 0.01), is_held_out(hashes, 0.3)
    # Five standard deviations of a binomial count.
    assert abs(small.mean() - 0.01) < 5 * (0.01 * 0.99 / 20_000) ** 0.5
    assert abs(large.mean() - 0.3) < 5 * (0.3 * 0.7 / 20_000) ** 0.5
    assert not (small & ~large).any() and not is_held_out(hashes, 0).any()

"""Which held-out windows an update of the mixture looks at."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rewarm.evaluation.held_out import rotated_windows


class Numbered:
    """A split whose windows are their own numbers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray) -> np.ndarray:
        return indices[:, None]


def turn(total: int, count: int, number: int, key: bytes = b"key") -> list[int]:
    return rotated_windows(Numbered(total), count, number, key)[:, 0].tolist()  # type: ignore[arg-type]


@given(st.integers(1, 50), st.integers(1, 60))
def test_every_window_has_its_turn_equally_often(total: int, count: int) -> None:
    turns = [turn(total, count, number) for number in range(total)]
    assert all(len(set(found)) == len(found) == min(total, count) for found in turns)
    assert set(np.bincount(np.concatenate(turns), minlength=total)) == {min(total, count)}


def test_a_turn_depends_on_its_number_and_key_alone_and_not_on_the_place_in_the_file() -> None:
    assert turn(1000, 16, 7) == turn(1000, 16, 7)
    assert not set(turn(1000, 16, 7)) & set(turn(1000, 16, 8))
    assert turn(1000, 16, 7) != turn(1000, 16, 7, b"other")
    # Neighbours in the file are often of one document: 500 draws of a whole split have the spread of one.
    found = np.concatenate([turn(1000, 16, number) for number in range(31)])
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.15

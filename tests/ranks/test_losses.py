"""A refactoring repeats the committed losses: to the bit on the platform that they were made on, else to 1e-6."""

from __future__ import annotations

import pytest

from ranks.losses import CASES, largest_change, measure, read, this_platform

ELSEWHERE = 1e-6
REMAKE = "if the change is meant, run: python scripts/update_losses.py"


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_that_are_committed(case: str) -> None:
    platform, expected = read(case)
    found = measure(case)
    if platform == this_platform():
        assert found == expected, REMAKE
    else:
        assert largest_change(expected, found) < ELSEWHERE, REMAKE


def test_a_changed_bit_is_a_change() -> None:
    steps = [{"loss": (6.0).hex(), "grad_norm": (1.5).hex()}]
    changed = [{"loss": (6.0).hex(), "grad_norm": (1.5 + 2e-6).hex()}]
    assert largest_change(steps, steps) == 0
    assert ELSEWHERE < largest_change(steps, changed) < 2 * ELSEWHERE
    assert largest_change(steps, []) == float("inf")

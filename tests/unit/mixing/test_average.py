"""The mean mixture of a run."""

from __future__ import annotations

import pytest

from rewarm.errors import UserError
from rewarm.mixing.average import average_shares
from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import TOTAL


def test_each_entry_counts_as_long_as_it_was_in_force() -> None:
    half, quarter = TOTAL // 2, TOTAL // 4
    entries = [
        WeightEntry(0, {"a": half, "b": quarter, "old": quarter}, "start"),
        WeightEntry(60, {"a": quarter, "b": half, "old": quarter}, "planned", {"a": 0, "b": half, "old": half}),
        WeightEntry(20, {"a": quarter, "b": quarter, "old": half}, "decided later"),
        WeightEntry(90, {"a": 0, "b": TOTAL, "old": 0}, "not reached"),
    ]
    # a: 20 * .5 + 40 * .25 + 20 * .25 = 25, b: 20 * .25 + 40 * .25 + 20 * .5 = 25
    assert average_shares(entries, 80, ["a", "b"], objective=False) == pytest.approx({"a": 0.5, "b": 0.5})
    # Of the loss the last 20 samples have a: 0, b: .5.
    assert average_shares(entries, 80, ["a", "b"], objective=True) == pytest.approx({"a": 20 / 45, "b": 25 / 45})
    with pytest.raises(UserError, match="nothing to average"):
        average_shares(entries, 0, ["a", "b"], objective=False)

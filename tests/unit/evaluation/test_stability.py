"""Stability-gap figures against curves whose figures can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.evaluation.stability import stability_gap, worst_case_loss
from rewarm.tracking.metrics import EvaluationLine


def lines(tokens: list[int], **losses: list[float | None]) -> list[EvaluationLine]:
    return [
        {
            "step": index,
            "tokens": at,
            "domains": {name: {"loss": curve[index], "bits_per_byte": None} for name, curve in losses.items()},
        }
        for index, at in enumerate(tokens)
    ]


def test_a_triangle() -> None:
    """Rise by 0.5 over 100 tokens, back to 0.1 above the start at 200, then flat."""
    gap = stability_gap(lines([0, 100, 200, 300], english=[2.0, 2.5, 2.1, 2.1]), "english", tolerance=0.2)
    assert gap.peak_rise == pytest.approx(0.5)
    assert gap.peak_tokens == 100
    assert gap.final_forgetting == pytest.approx(0.1)
    assert gap.recovery_tokens == 200
    # Above 2.1: from where the rise crosses it (20 tokens in) to 100, then back to 200: two triangles 0.4 high.
    assert gap.area == pytest.approx(0.4 * 80 / 2 + 0.4 * 100 / 2)
    assert gap.worst_rise == pytest.approx(0.5)


def test_never_recovered_and_never_left() -> None:
    risen = stability_gap(lines([0, 10, 20], old=[1.0, 1.5, 1.4]), "old", tolerance=0.1)
    assert risen.recovery_tokens is None
    fallen = stability_gap(lines([0, 10, 20], old=[1.0, 0.9, 0.8]), "old")
    assert (fallen.recovery_tokens, fallen.peak_rise, fallen.peak_tokens) == (0, 0.0, 0)
    assert fallen.final_forgetting == pytest.approx(-0.2)
    assert fallen.worst_rise == 0.0


def test_counts_from_the_first_line_and_passes_over_missing_ones() -> None:
    gap = stability_gap(lines([500, 600, 700, 800], old=[1.0, None, 1.6, 1.0]), "old", tolerance=0.0)
    assert (gap.peak_tokens, gap.recovery_tokens) == (200, 300)
    assert gap.area == pytest.approx(0.6 * 200 / 2 + 0.6 * 100 / 2)


def test_a_single_evaluation_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        stability_gap(lines([0], old=[1.0]), "old")


@given(st.lists(st.floats(0.5, 5), min_size=2, max_size=12), st.data())
def test_area_is_the_integral(losses: list[float], data: st.DataObject) -> None:
    """Against a fine numerical integral of the same broken line."""
    steps = data.draw(st.lists(st.integers(1, 50), min_size=len(losses) - 1, max_size=len(losses) - 1))
    tokens = [0, *np.cumsum(steps).tolist()]
    fine = np.linspace(0, tokens[-1], 40_001)
    above = np.maximum(0, np.interp(fine, tokens, losses) - losses[-1])
    expected = np.trapezoid(above, fine)
    gap = stability_gap(lines(tokens, old=list(losses)), "old")
    assert gap.area == pytest.approx(expected, rel=1e-3, abs=1e-3 * tokens[-1])
    assert gap.peak_rise >= gap.final_forgetting
    assert gap.worst_rise >= gap.peak_rise


def test_worst_case_loss() -> None:
    """Two old domains with worst losses 3 and 5, a new one that ends at 1: 1/3 + 2/3 * 4."""
    found = worst_case_loss(lines([0, 1, 2], a=[2, 3, 2], b=[5, 4, 4], c=[9, 2, 1]), ["a", "b"], "c")
    assert found == pytest.approx(1 / 3 + 2 / 3 * 4)

"""Gradient statistics from few windows: without bias, and without work for windows that nobody asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewarm.engine import gradients
from rewarm.engine.base import Batch

VECTORS = np.array([[3.0, -1.0, 0.5], [-2.0, 0.25, 1.0], [1.0, 1.0, -4.0]])
"""The gradients of single windows of a domain that has no others."""


def of_batch(batch: Batch) -> torch.Tensor:
    """The gradient of a batch whose windows are numbered by their tokens."""
    assert batch.loss_mask is not None
    return torch.from_numpy(VECTORS[batch.tokens[batch.loss_mask[:, 0], 0]].mean(axis=0)).float()


def test_statistics_of_few_windows_have_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients.ranks, "sum_over_ranks", lambda values: values)
    found = []
    # Every way to draw 3 windows, with chunks of 1 and 2 of them; and as many of a second domain.
    for drawn in itertools.product(range(3), repeat=3):
        for other in itertools.product(range(2), repeat=2):
            tokens = [np.array(windows)[:, None].repeat(2, axis=1) for windows in (drawn, other)]
            found.append(gradients.gradient_statistics(of_batch, tokens, 2, micro_batch_size=8, share=0, num_shares=1))
    mean, other = VECTORS.mean(axis=0), VECTORS[:2].mean(axis=0)
    trace = ((VECTORS - mean) ** 2).sum() / 3
    assert np.mean([each.squared_norms[0] for each in found]) == pytest.approx(mean @ mean, rel=1e-5)
    assert np.mean([each.variances[0] for each in found]) == pytest.approx(trace, rel=1e-5)
    assert np.mean([each.products[0, 1] for each in found]) == pytest.approx(mean @ other, rel=1e-5)
    assert np.mean([each.products[0, 0] for each in found]) == pytest.approx(mean @ mean + trace / 3, rel=1e-5)
    assert min(each.squared_norms[0] for each in found) < 0


@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 9), st.integers(1, 4))
def test_slices_hold_every_window_once_and_little_else(count: int, size: int, shares: int, stages: int) -> None:
    windows = np.arange(count)[:, None].repeat(3, axis=1)
    slices = [gradients.slice_of(windows, 5, size, share, shares, stages) for share in range(shares)]
    counted = np.concatenate([each.tokens[each.loss_mask[:, 0], 0] for each in slices])  # type: ignore[index]
    assert counted.tolist() == list(range(count))
    lengths = {len(each.tokens) for each in slices}
    assert len(lengths) == 1
    length = lengths.pop()
    # What the engine makes of it: equal micro-batches, a multiple of the stages.
    micro = min(size, length // stages)
    assert length % (micro * stages) == 0
    # A pass over a few windows is not filled up to the micro-batch of training: each rank and stage at most its own.
    if count <= size * shares * stages:
        assert length == stages * -(-count // (shares * stages))

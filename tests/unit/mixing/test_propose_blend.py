"""The proposed blend against a search by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rewarm.errors import UserError
from rewarm.mixing.propose import propose_blend

SHARES = np.linspace(0, 1, 9)


def old(share: np.ndarray | float) -> np.ndarray:
    return np.asarray(1.0 + np.exp(0.2 * (1 - share) + 0.9 * share))


def new(share: np.ndarray | float) -> np.ndarray:
    return np.asarray(0.5 + np.exp(1.1 * (1 - share) - 0.4 * share))


def test_the_best_share_is_that_of_a_search() -> None:
    losses = [{"old": float(old(share)), "new": float(new(share))} for share in SHARES]
    found = propose_blend(SHARES.tolist(), losses, 0.3, importance={"old": 2.0, "new": 1.0}, divergence=0.05)
    grid = np.linspace(1e-6, 1 - 1e-6, 200_001)
    divergence = grid * np.log(grid / 0.3) + (1 - grid) * np.log((1 - grid) / 0.7)
    cost = (2 * old(grid) + new(grid)) / 3 + 0.05 * divergence
    assert found["share"] == pytest.approx(grid[cost.argmin()], abs=1e-3)
    assert found["loss"]["new"] == pytest.approx(float(new(found["share"])), abs=1e-4)
    assert found["worst_residual"] < 1e-4
    assert found == propose_blend(SHARES.tolist(), losses, 0.3, importance={"old": 2.0, "new": 1.0})


def test_a_strong_prior_wins_and_too_few_models_are_refused() -> None:
    losses = [{"old": float(old(share)), "new": float(new(share))} for share in SHARES]
    assert propose_blend(SHARES.tolist(), losses, 0.3, divergence=1e4)["share"] == pytest.approx(0.3, abs=1e-3)
    with pytest.raises(UserError, match="2 runs do not determine"):
        propose_blend([0.0, 1.0], losses[:2], 0.5)

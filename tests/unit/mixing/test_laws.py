"""Fits recover what made the data; proposals are optimal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.errors import UserError
from rewarm.mixing.mixture_law import MixtureLaw, fit_mixture_law, propose_mixture
from rewarm.mixing.power_law import fit_power_law
from rewarm.mixing.repetition import cap_weights, effective_tokens


@given(st.floats(0.2, 3), st.floats(0.3, 3), st.floats(0.15, 0.8))
@settings(max_examples=25)
def test_a_power_law_is_recovered_and_extrapolated(limit: float, reducible: float, exponent: float) -> None:
    tokens = np.geomspace(1e6, 1e8, 12)
    losses = limit + reducible * (tokens / 1e6) ** -exponent
    law = fit_power_law(tokens, losses)
    expected = limit + reducible * 1e3**-exponent
    assert law(1e9) == pytest.approx(expected, abs=2e-3 * reducible)
    assert law.worst_residual < 1e-3 * reducible


def test_one_bad_evaluation_does_not_bend_the_law() -> None:
    tokens = np.geomspace(1e6, 1e8, 15)
    losses = 1.5 + 2.0 * (tokens / 1e6) ** -0.4
    losses[7] += 0.5
    law = fit_power_law(tokens, losses)
    assert law(1e9) == pytest.approx(1.5 + 2.0 * 1e3**-0.4, abs=0.02)
    assert law.worst_residual == pytest.approx(0.5, abs=0.02)


def test_too_few_or_impossible_points_are_refused() -> None:
    with pytest.raises(UserError, match="3 points"):
        fit_power_law(np.array([1.0, 2, 3, 3]), np.ones(4))
    with pytest.raises(UserError, match="not positive and finite"):
        fit_power_law(np.arange(1.0, 6), np.array([1, 1, np.nan, 1, 1]))


def example_law(seed: int, domains: int = 3) -> MixtureLaw:
    rng = np.random.default_rng(seed)
    slopes = rng.normal(0, 0.3, (domains, domains)) - np.diag(rng.uniform(1, 3, domains))
    return MixtureLaw(rng.uniform(1, 2, domains), slopes, np.zeros((0, domains)))


@pytest.mark.parametrize("seed", range(4))
def test_a_mixing_law_is_recovered(seed: int) -> None:
    law, rng = example_law(seed), np.random.default_rng(seed + 100)
    mixtures = rng.dirichlet(np.ones(3), 20)
    fitted = fit_mixture_law(mixtures, law(mixtures))
    unseen = rng.dirichlet(np.ones(3), 50)
    np.testing.assert_allclose(fitted(unseen), law(unseen), atol=1e-3)
    assert np.abs(fitted.residuals).max() < 1e-3


def test_runs_that_do_not_determine_the_law_are_refused() -> None:
    with pytest.raises(UserError, match="at least 4 runs"):
        fit_mixture_law(np.eye(3), np.ones((3, 2)))
    with pytest.raises(UserError, match="do not tell"):
        fit_mixture_law(np.tile([0.5, 0.25, 0.25], (6, 1)), np.ones((6, 2)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("caps", [None, [0.4, 0.5, 0.6]])
def test_a_proposal_beats_every_mixture_of_a_fine_grid(seed: int, caps: list[float] | None) -> None:
    law, prior = example_law(seed), np.array([0.6, 0.3, 0.1])

    def objective(x: np.ndarray) -> np.ndarray:
        ratio = np.log(np.maximum(x, 1e-12) / prior)
        return law(x).mean(axis=-1) + 0.05 * (x * ratio).sum(axis=-1)

    best = propose_mixture(law, prior, caps=caps)
    a, b = np.meshgrid(np.linspace(0, 1, 201), np.linspace(0, 1, 201))
    grid = np.stack([a, b, 1 - a - b], axis=-1).reshape(-1, 3)
    grid = grid[(grid >= -1e-12).all(axis=1) & (grid <= np.array(caps or [1, 1, 1]) + 1e-12).all(axis=1)]
    assert best.sum() == pytest.approx(1)
    assert (best <= np.array(caps or [1, 1, 1]) + 1e-9).all()
    assert objective(best) <= objective(grid).min() + 1e-9


def test_of_a_prior_only_the_proportions_count() -> None:
    """Numbers of tokens serve as well as shares: a power of two changes no digit."""
    law, shares = example_law(0), np.array([0.6, 0.3, 0.1])
    assert propose_mixture(law, shares * 2.0**30).tolist() == propose_mixture(law, shares).tolist()


def test_caps_that_no_mixture_meets_are_refused() -> None:
    with pytest.raises(UserError, match="sum to 0.6"):
        propose_mixture(example_law(0), [1, 1, 1], caps=[0.2, 0.2, 0.2])


@pytest.mark.parametrize(("epochs", "worth"), [(2, 1.968), (4, 3.726), (8, 6.624), (16, 10.582), (40, 15.167)])
def test_repeated_tokens_are_worth_what_was_published(epochs: float, worth: float) -> None:
    assert effective_tokens(1.0, epochs) == pytest.approx(worth, abs=5e-4)
    assert effective_tokens(1e9, 0.5) == 5e8


def test_caps_that_fall_short_by_rounding_alone_are_met() -> None:
    caps = np.array([0.25 - 8e-13, 0.75])
    assert cap_weights(np.array([0.5, 0.5]), caps).tolist() == caps.tolist()


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), min_size=1, max_size=7))
def test_capped_weights_keep_ratios_below_their_caps(spec: list[tuple[float, float]]) -> None:
    weights = np.array([w for w, _ in spec]) / sum(w for w, _ in spec)
    caps = np.array([c for _, c in spec])
    if caps.sum() < 1 - 1e-9:
        with pytest.raises(UserError, match="may take"):
            cap_weights(weights, caps)
        return
    result = cap_weights(weights, caps)
    assert result.sum() == pytest.approx(1) and (result <= caps + 1e-9).all()
    free = result < caps - 1e-9
    growth = result[free] / weights[free]
    assert len(growth) == 0 or (np.ptp(growth) < 1e-6 and growth.min() >= 1 - 1e-9)
    assert (result[~free] / weights[~free] <= (growth.min() if len(growth) else np.inf) + 1e-6).all()

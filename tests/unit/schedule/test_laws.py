"""The annealing law against closed forms, and fits against curves whose law is known."""

from __future__ import annotations

import numpy as np
import pytest

from rewarm.config.training import ScheduleConfig
from rewarm.schedule.laws import HUBER_DELTA, AnnealingLaw, LossCurve, _distance, _readings, _start, fit_annealing_law
from rewarm.schedule.learning_rate import LearningRate

NUM_STEPS = 20_000
# Of the order of the authors' own example, refitted: a 20k-step cosine and constant pair at peak 2e-4.
TRUTH = AnnealingLaw(floor=2.63, amplitude=0.43, exponent=0.55, annealing=0.41)


def rates(num_steps: int = NUM_STEPS, **values: object) -> np.ndarray:
    config = ScheduleConfig.model_validate({"peak": 2e-4, "warmup": "500 steps", **values})
    schedule = LearningRate(config, num_steps, 1)
    return np.array([schedule.at(step) for step in range(num_steps)])


def curve(law: AnnealingLaw, of: np.ndarray, noise: np.ndarray | None = None) -> LossCurve:
    steps = np.arange(1000, len(of) + 1, 100)
    losses = law.predict(of)[steps - 1]
    return LossCurve(of, steps, losses if noise is None else losses + noise[: len(steps)])


def test_a_single_drop_in_closed_form() -> None:
    """S2 after n steps at the lower rate is the geometric series drop * (1 - decay^n) / (1 - decay)."""
    law = AnnealingLaw(floor=0.0, amplitude=0.0, exponent=1.0, annealing=1.0, decay=0.9)
    found = law.predict(np.array([1.0] * 5 + [0.25] * 4))
    expected = [-0.75 * (1 - 0.9**n) / 0.1 for n in range(1, 5)]
    np.testing.assert_allclose(found[:5], 0.0)
    np.testing.assert_allclose(found[5:], expected)


def test_constant_rate_is_a_power_law_and_warm_up_counts_as_peak() -> None:
    law = AnnealingLaw(floor=2.0, amplitude=3.0, exponent=0.5, annealing=9.0)
    expected = 2.0 + 3.0 * (0.1 * np.arange(1, 101)) ** -0.5
    np.testing.assert_allclose(law.predict(np.full(100, 0.1)), expected)
    warming = np.concatenate([np.linspace(0.0, 0.1, 11)[1:], np.full(90, 0.1)])
    np.testing.assert_allclose(law.predict(warming), expected)


def test_warming_up_again_predicts_a_rise() -> None:
    fallen = np.concatenate([np.full(10_000, 2e-4), np.linspace(2e-4, 2e-5, 10_000), np.full(1000, 2e-5)])
    again = np.concatenate([fallen, np.full(300, 2e-4)])
    assert TRUTH.predict(again)[-1] > TRUTH.predict(fallen)[-1]


def test_fit_finds_the_law_and_predicts_a_schedule_it_has_not_seen() -> None:
    seen = [curve(TRUTH, rates(kind="constant")), curve(TRUTH, rates(kind="cosine", minimum=2e-5))]
    law = fit_annealing_law(seen)
    assert law.floor == pytest.approx(TRUTH.floor, rel=0.01)
    assert law.exponent == pytest.approx(TRUTH.exponent, rel=0.05)
    assert law.annealing == pytest.approx(TRUTH.annealing, rel=0.05)
    unseen = rates(kind="wsd", minimum=2e-6, decay="20%")
    assert np.abs(law.predict(unseen) - TRUTH.predict(unseen))[1000:].max() < 2e-3
    longer = rates(3 * NUM_STEPS, kind="cosine", minimum=2e-5)
    assert np.abs(law.predict(longer) - TRUTH.predict(longer))[1000:].max() < 5e-3


def test_noise_and_spikes_do_not_bend_the_fit() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.01, 400)
    noise[random.choice(400, 8, replace=False)] += 1.0
    seen = [curve(TRUTH, rates(kind=kind, **more), noise) for kind, more in
            (("constant", {}), ("cosine", {"minimum": 2e-5}))]  # fmt: skip
    law = fit_annealing_law(seen)
    unseen = rates(kind="wsd", minimum=2e-6, decay="20%")
    assert np.abs(law.predict(unseen) - TRUTH.predict(unseen))[1000:].mean() < 0.01


def test_readings_that_cannot_be_fitted() -> None:
    flat = np.full(10, 1e-3)
    with pytest.raises(ValueError, match="3 readings; the four coefficients need at least four"):
        fit_annealing_law([LossCurve(flat, np.array([1, 2, 3]), np.array([3.0, 2.9, 2.8]))])
    fit_annealing_law([LossCurve(flat, np.array([1, 2, 3, 10]), np.array([3.0, 2.9, 2.8, 2.5]))])
    with pytest.raises(ValueError, match="of a run of 10 steps"):
        fit_annealing_law([LossCurve(flat, np.array([1, 2, 3, 11]), np.full(4, 3.0))])
    with pytest.raises(ValueError, match="readings at steps 0 to 3 of a run of 10 steps"):
        fit_annealing_law([LossCurve(flat, np.array([0, 1, 2, 3]), np.full(4, 3.0))])


def test_a_rate_that_falls_after_the_first_step() -> None:
    law = AnnealingLaw(floor=0.0, amplitude=0.0, exponent=1.0, annealing=1.0, decay=0.5)
    np.testing.assert_allclose(law.predict(np.array([1.0, 0.25, 0.25])), [0.0, -0.75, -0.75 * 1.5])


def test_readings_are_the_sums_after_their_steps() -> None:
    rates_read = np.array([0.5, 1.0, 0.75, 0.5, 0.5])
    curves = [LossCurve(rates_read, np.array([5, 1]), np.array([2.0, 4.0])),
              LossCurve(rates_read[:3], np.array([3]), np.array([3.0])),
              LossCurve(rates_read, np.array([4]), np.array([2.5]))]  # fmt: skip
    (progress, annealed), losses = _readings(curves, 0.5)
    held = [1.0, 1.0, 0.75, 0.5, 0.5]
    momentum = [0.0, 0.0, 0.25, 0.125 + 0.25, 0.1875]
    assert progress.tolist() == [sum(held), held[0], sum(held[:3]), sum(held[:4])]
    assert annealed.tolist() == [sum(momentum), 0.0, sum(momentum[:3]), sum(momentum[:4])]
    assert losses.tolist() == [2.0, 4.0, 3.0, 2.5]


def test_the_distance_is_huber_s_loss_of_the_log_residuals() -> None:
    """Half the square up to delta, linear with the same slope above, and finite where the law is below 0."""
    design = np.array([1.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0])
    law = np.array([1.0, 1.0, 0.7, 5.0])
    small, large = HUBER_DELTA / 2, 3 * HUBER_DELTA
    losses = np.array([2 * np.exp(small), 2 * np.exp(-large), 1.0])
    far = -np.log(1e-9)
    expected = [small**2 / 2, HUBER_DELTA * large - HUBER_DELTA**2 / 2, HUBER_DELTA * far - HUBER_DELTA**2 / 2]
    assert _distance(law, design, losses) == pytest.approx(np.mean(expected) / HUBER_DELTA**2, rel=1e-9)


def test_the_search_starts_at_the_law_where_the_exponent_is_known() -> None:
    design = np.linspace(0.5, 4.0, 9), np.linspace(0.0, 1.0, 9) ** 2
    losses = 2.0 + 1.5 * design[0] ** -0.5 - 0.25 * design[1]
    np.testing.assert_allclose(_start(0.5, design, losses), [2.0, 1.5, 0.5, 0.25], rtol=1e-6)


def test_no_coefficient_is_below_zero() -> None:
    """Curves whose loss rises as the rate falls: the paper allows no such annealing."""
    odd = AnnealingLaw(floor=0.0, amplitude=3.0, exponent=0.3, annealing=-0.3)
    law = fit_annealing_law([curve(odd, rates(kind="constant")), curve(odd, rates(kind="cosine", minimum=2e-5))])
    assert min(law.floor, law.amplitude, law.exponent, law.annealing) >= 0
    assert law.annealing == pytest.approx(0.0, abs=1e-3)

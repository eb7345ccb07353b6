"""The update rules: published numbers, independent calculations, and what must not change."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.errors import UserError
from rewarm.mixing.mixers.ado import ADOMixer
from rewarm.mixing.mixers.aioli import AioliMixer, AioliRounds
from rewarm.mixing.mixers.base import Mixer, Observation, by_domain, exponentiated_gradient
from rewarm.mixing.mixers.doge import DoGEMixer
from rewarm.mixing.mixers.doremi import DoReMiMixer
from rewarm.mixing.mixers.dynamic_batch_loading import DynamicBatchLoadingMixer
from rewarm.mixing.mixers.odm import ODMMixer
from rewarm.mixing.mixers.pike import PiKEMixer
from rewarm.mixing.mixers.skill_it import SkillItMixer
from rewarm.mixing.mixers.static import StaticMixer
from rewarm.mixing.mixers.temperature import temperature_weights
from rewarm.mixing.mixers.unimax import unimax_weights
from rewarm.mixing.mixers.velocitune import VelocituneMixer

NAMES = ["a", "b", "c"]
W = np.array([0.5, 0.3, 0.2])
LOSSES, INITIAL, TARGETS = np.array([1.6, 2.2, 3.0]), np.array([2.0, 2.5, 3.2]), np.array([1.5, 1.9, 2.7])


def close(found: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_velocitune_golden_vector() -> None:
    mixer = VelocituneMixer(NAMES, W, TARGETS, INITIAL)
    weights = mixer.update(Observation(10, losses=LOSSES))
    close(mixer.velocities, [0.2, 0.5, 0.6])
    close(weights, [0.415516, 0.336533, 0.247951])


def test_dynamic_batch_loading_golden_vector() -> None:
    mixer = DynamicBatchLoadingMixer(NAMES, W, TARGETS)
    close(mixer.update(Observation(10, losses=LOSSES)), [0.450154, 0.329901, 0.219945])


def test_doremi_golden_vector() -> None:
    mixer = DoReMiMixer(NAMES, W, LOSSES - [0.4, -0.1, 0.2])
    close(mixer.update(Observation(10, losses=LOSSES)), [0.577895, 0.232624, 0.189480])


def test_odm_golden_vector() -> None:
    mixer = ODMMixer(NAMES, W)
    weights = mixer.update(Observation(100, training_losses=LOSSES))
    assert mixer.exploration == pytest.approx(0.060515, abs=1e-6)
    close(mixer.rewards, [0.32, 0.733333, 1.5])
    close(weights, [0.286007, 0.319317, 0.394675])


def test_pike_golden_vector() -> None:
    mixer = PiKEMixer(NAMES, W, batch_size=64, norm_factor=0.5, variance_factor=1.0)
    seen = Observation(
        10, squared_gradient_norms=np.array([1, 0.5, 0.25]), gradient_variances=np.array([2.0, 8.0, 4.0])
    )
    close(mixer.update(seen), [0.582569, 0.259757, 0.157674])


def test_temperature_golden_vector() -> None:
    close(temperature_weights(np.array([900, 90, 10]), 5), [0.490787, 0.309666, 0.199547])
    close(temperature_weights(np.array([900, 90, 10]), 1), [0.9, 0.09, 0.01])


def test_unimax_fills_from_the_smallest() -> None:
    # A budget of 300 over domains of 10, 100 and 1000 with 4 passes: 40 from the first, 130 from each of the others.
    close(unimax_weights(np.array([1000, 10, 100]), 300, 4.0), [130 / 300, 40 / 300, 130 / 300])
    # More budget than all caps: proportional to the caps, that is to the sizes.
    close(unimax_weights(np.array([10, 30]), 1e6, 2.0), [0.25, 0.75])


@given(st.lists(st.floats(1, 1e12), min_size=1, max_size=8), st.floats(1, 1e13), st.floats(0.1, 10))
def test_unimax_never_exceeds_its_cap_and_is_equal_below_it(tokens: list[float], budget: float, cap: float) -> None:
    sizes = np.array(tokens)
    weights = unimax_weights(sizes, budget, cap)
    assert weights.sum() == pytest.approx(1)
    if budget <= cap * sizes.sum():
        passes = weights * budget / sizes
        assert passes.max() <= cap * (1 + 1e-9)
        free = weights[passes < cap * (1 - 1e-9)]
        assert len(free) == 0 or (np.ptp(free) < 1e-9 and free[0] >= weights.max() - 1e-9)


def test_velocitune_takes_its_initial_losses_from_the_first_observation() -> None:
    mixer = VelocituneMixer(NAMES, W, TARGETS)
    close(mixer.update(Observation(0, losses=INITIAL)), W.tolist())
    close(mixer.update(Observation(10, losses=LOSSES)), [0.415516, 0.336533, 0.247951])


def test_velocitune_gives_no_velocity_to_what_is_learned_and_says_so() -> None:
    mixer = VelocituneMixer(NAMES, W, np.array([1.5, 2.5, 3.0]), INITIAL, learned_margin=0.25)
    mixer.update(Observation(10, losses=LOSSES))
    # b starts at its target, c within the margin; a is at (1.6 - 1.5) / (2 - 1.5).
    close(mixer.velocities, [0.2, 0, 0])
    assert mixer.note == "already at the target when the stage began: b, c"


losses_of_three = st.lists(st.floats(0.1, 10), min_size=3, max_size=3).map(np.array)
weights_of_three = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(lambda w: np.array(w) / sum(w))


@given(weights_of_three, st.floats(0, 1), losses_of_three)
def test_equal_velocities_leave_velocitune_weights_fixed(w: np.ndarray, velocity: float, targets: np.ndarray) -> None:
    mixer = VelocituneMixer(NAMES, w, targets, targets + 1)
    np.testing.assert_allclose(mixer.update(Observation(1, losses=targets + velocity)), w, rtol=1e-9)


def rules(order: list[int], w: np.ndarray, targets: np.ndarray) -> list[Mixer]:
    names = [NAMES[i] for i in order]
    w, targets, graph = w[order], targets[order], np.arange(9.0).reshape(3, 3)[np.ix_(order, order)]
    return [
        VelocituneMixer(names, w, targets, targets + 2, floor=0.01),
        DynamicBatchLoadingMixer(names, w, targets),
        DoReMiMixer(names, w, targets),
        ODMMixer(names, w),
        SkillItMixer(names, w, graph, step_size=0.05),
        PiKEMixer(names, w),
        DoGEMixer(names, w),
        AioliMixer(names, w),
    ]


def seen(order: list[int], losses: np.ndarray) -> Observation:
    products = np.array([[2.0, 0.5, -0.2], [0.5, 1.0, 0.3], [-0.2, 0.3, 0.7]]) * losses[0]
    probes = np.array([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    drops = np.array([[0.3, 0.1, 0.0], [0.1, 0.4, 0.0], [0.0, 0.2, 0.5]]) * losses[1]
    return Observation(
        50,
        losses=losses[order],
        training_losses=losses[order],
        squared_gradient_norms=losses[order] / 10,
        gradient_variances=losses[order],
        gradient_products=products[np.ix_(order, order)],
        probe_mixes=probes[:, order],
        probe_drops=drops[:, order],
    )


@given(st.permutations([0, 1, 2]), weights_of_three, losses_of_three, losses_of_three)
def test_permuting_domains_permutes_weights(
    order: list[int], w: np.ndarray, losses: np.ndarray, targets: np.ndarray
) -> None:
    for plain, permuted in zip(rules([0, 1, 2], w, targets), rules(order, w, targets), strict=True):
        for _ in range(2):
            expected = plain.update(seen([0, 1, 2], losses))
            found = permuted.update(seen(order, losses))
        np.testing.assert_allclose(found, expected[order], atol=1e-9, err_msg=plain.name)
        assert found.min() >= 0 and found.sum() == pytest.approx(1)


@given(weights_of_three, losses_of_three, losses_of_three)
def test_state_through_json_gives_the_same_next_weights(w: np.ndarray, losses: np.ndarray, targets: np.ndarray) -> None:
    for first, second in zip(rules([0, 1, 2], w, targets), rules([0, 1, 2], np.ones(3), targets), strict=True):
        first.update(seen([0, 1, 2], losses))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        later = seen([0, 1, 2], losses * 0.9)
        assert first.update(later).tolist() == second.update(later).tolist(), first.name
        assert first.details() == second.details(), first.name


def test_state_of_other_domains_is_refused() -> None:
    with pytest.raises(UserError, match="state of mixer static"):
        StaticMixer(["x", "y", "z"], W).load_state_dict(StaticMixer(NAMES, W).state_dict())


def test_doremi_result_is_the_mean_and_an_absent_domain_keeps_its_excess() -> None:
    mixer = DoReMiMixer(NAMES, W, np.zeros(3), floor=0.0)
    first = mixer.update(Observation(1, losses=np.array([1.0, 0.0, 0.5])))
    second = mixer.update(Observation(2, losses=np.array([math.nan, 1.0, 0.5])))
    close(mixer.average, ((first + second) / 2).tolist())
    powers = first * np.exp([1.0, 1.0, 0.5])
    close(second, (powers / powers.sum()).tolist())


def test_odm_waits_for_its_warmup_and_skips_what_was_not_drawn() -> None:
    mixer = ODMMixer(NAMES, W, warmup=100)
    close(mixer.update(Observation(99, training_losses=LOSSES)), W.tolist())
    rewards = mixer.rewards.copy()
    mixer.update(Observation(100, training_losses=np.array([1.0, math.nan, 1.0])))
    assert mixer.rewards[1] == rewards[1] and mixer.rewards[0] == pytest.approx(0.9 * rewards[0] + 0.1 * 1.0 / 0.5)


def test_skill_it_sums_the_last_losses_through_the_graph() -> None:
    graph = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mixer = SkillItMixer(NAMES, W, graph, step_size=0.1, memory=2)
    for losses in ([9.0, 9.0, 9.0], [1.0, 2.0, 3.0], [2.0, 2.0, 2.0]):
        weights = mixer.update(Observation(1, losses=np.array(losses)))
    powers = [math.exp(0.1 * s) for s in (3 + 0.5 * 4, 4, 5)]
    close(weights, [p / sum(powers) for p in powers])
    with pytest.raises(UserError, match="no edge"):
        SkillItMixer(NAMES, W, np.zeros((3, 3)))


def test_aioli_recovers_the_interaction_matrix() -> None:
    interaction = np.array([[0.5, 0.1, 0.2], [0.0, 0.3, 0.1], [0.2, 0.4, 0.6]])  # [loss, trained domain]
    mixes = np.array([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6], [0.6, 0.2, 0.2]])
    weights = AioliMixer(NAMES, W, step_size=1.0).update(
        Observation(1, probe_mixes=mixes, probe_drops=mixes @ interaction.T)
    )
    powers = [math.exp(s / 2.4) for s in (0.7, 0.8, 0.9)]
    close(weights, [p / sum(powers) for p in powers])
    with pytest.raises(UserError, match="do not tell"):
        AioliMixer(NAMES, W).update(Observation(1, probe_mixes=mixes[[0, 0, 0]], probe_drops=mixes[[0, 0, 0]]))


INTERACTION = np.array([[0.5, 0.1, 0.2], [0.0, 0.3, 0.1], [0.2, 0.4, 0.6]])  # [loss, trained domain]


def run_aioli(mixer: AioliRounds, updates: int, *, lag: float = 0.0, skip: int | None = None) -> list[np.ndarray]:
    """Drive it with losses that fall linearly with what is trained on; ``lag`` of each interval has older weights."""
    losses, weights, history = np.full(3, 9.0), [mixer.weights, mixer.weights], []
    counts = np.zeros(3)
    for update in range(updates):
        if update != skip:
            seen = Observation(update, losses=losses.copy(), training_counts=counts.astype(np.int64))
            chosen, counts = mixer.update(seen), np.zeros(3)
            weights = [weights[1], chosen]
        history.append(weights[1])
        trained = np.rint(1e6 * (lag * weights[0] + (1 - lag) * weights[1]))
        counts, losses = counts + trained, losses - INTERACTION @ trained / 1e7
    return history


@pytest.mark.parametrize(("lag", "skip"), [(0.0, None), (0.4, None), (0.0, 2), (1.0, None)])
def test_aioli_probes_in_a_run_and_finds_the_interaction_whenever_weights_take_effect(
    lag: float, skip: int | None
) -> None:
    mixer = AioliRounds(NAMES, W, step_size=1.0, probe_share=0.6, probes_per_domain=1, hold=5)
    history = run_aioli(mixer, 14, lag=lag, skip=skip)
    powers = [math.exp(s / 2.4) for s in (0.7, 0.8, 0.9)]
    close(history[6], [p / sum(powers) for p in powers])
    assert sorted(history[0].tolist()) == pytest.approx([0.2, 0.2, 0.6])
    assert len({tuple(weights) for weights in history[:3]}) >= (3 if skip is None else 2)
    assert any(sorted(weights.tolist()) == pytest.approx([0.2, 0.2, 0.6]) for weights in history[7:])


def test_aioli_goes_on_from_any_place_of_a_round() -> None:
    def fresh() -> AioliRounds:
        return AioliRounds(NAMES, W, probes_per_domain=2, hold=2, matrix_decay=0.5)

    first, losses = fresh(), np.full(3, 9.0)
    for update in range(25):
        second = fresh()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        losses = losses - np.array([0.1, 0.2, 0.3]) * (1 + update % 4)
        seen = Observation(update, losses=losses, training_counts=np.array([7, 5, 3 + update % 5]) * 100)
        assert first.update(seen).tolist() == second.update(seen).tolist()
        first.adopt(first.weights.round(3))
        second.adopt(second.weights.round(3))
        assert first.state_dict() == second.state_dict() and first.note == second.note


def test_aioli_averages_rounds_and_follows_the_weights_that_were_adopted() -> None:
    mixer = AioliRounds(NAMES, W, step_size=1.0, probe_share=0.6, probes_per_domain=1, hold=2, matrix_decay=0.25)
    mixer.matrix = np.diag([1.0, 0.0, 0.0])
    run_aioli(mixer, 4)
    expected = 0.25 * np.array([1.0, 0, 0]) + 0.75 * np.array([0.7, 0.8, 0.9]) / 2.4
    close(np.array(list(mixer.details()["effect"].values())), expected.tolist())
    mixer.adopt(np.array([0.2, 0.3, 0.5]))
    close(mixer.update(Observation(5, losses=np.ones(3), training_counts=np.ones(3, np.int64))), [0.2, 0.3, 0.5])


def test_aioli_refuses_probes_that_are_no_probes() -> None:
    with pytest.raises(UserError, match="no more than an equal share"):
        AioliRounds(NAMES, W, probe_share=1 / 3)


def test_doge_favours_gradients_that_serve_the_others() -> None:
    gradients = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    weights = DoGEMixer(NAMES, W, learning_rate=0.01, regularisation=0.01).update(
        Observation(1, gradient_products=gradients @ gradients.T)
    )
    norm = (1 + math.sqrt(2) + 1) / 3
    # <g_a, g_b + g_c> = 1, <g_b, g_a + g_c> = 0, <g_c, g_a + g_b> = -1, clipped at 0.
    powers = W * [math.exp(min(1 / norm, 5)), 1.0, 1.0]
    close(weights, (powers / powers.sum()).tolist())


def test_doge_bounds_what_one_update_can_do() -> None:
    gradients = np.array([[10.0, 0.0], [10.0, 0.0], [0.0, 10.0]])  # a and b serve each other 10 times the mean norm
    mixer = DoGEMixer(NAMES, W, learning_rate=0.01, regularisation=0.01)
    powers = W * [math.exp(5), math.exp(5), 1.0]
    close(mixer.update(Observation(1, gradient_products=gradients @ gradients.T)), (powers / powers.sum()).tolist())


def test_ado_prefers_the_domain_that_still_learns() -> None:
    mixer = ADOMixer(["slow", "fast"], np.array([0.5, 0.5]), warmup=0, smoothing=1.0)
    for step in range(1, 9):
        n = step * 1000.0
        losses = np.array([2.0 + 0.5 * n**-0.3, 1.0 + 30 * n**-0.3])
        mixer.update(Observation(step, training_losses=losses, training_counts=np.array([500, 500])))
    # Same exponent and credit: preferences are as the reducible losses, 0.5 to 30, then the floor of 0.01.
    close(mixer.weights, [max(0.5 / 30.5, 0.01), 30 / 30.5])
    twin = ADOMixer(["slow", "fast"], np.ones(2), warmup=0, smoothing=1.0)
    twin.load_state_dict(json.loads(json.dumps(mixer.state_dict())))
    later = Observation(9, training_losses=np.array([2.0, 2.0]), training_counts=np.array([900, 100]))
    assert mixer.update(later).tolist() == twin.update(later).tolist()


def test_ado_keeps_natural_weights_until_it_can_fit() -> None:
    mixer = ADOMixer(NAMES, W, warmup=10)
    for step in (5, 10, 15):
        close(mixer.update(Observation(step, training_losses=LOSSES, training_counts=np.full(3, 10))), W.tolist())


def test_exponentiated_gradient_keeps_zero_and_survives_large_scores() -> None:
    close(exponentiated_gradient(np.array([0.0, 0.5, 0.5]), np.array([1e5, 1e5, 0.0]), 1.0, 0.0), [0, 1, 0])
    close(exponentiated_gradient(np.array([0.0, 1.0]), np.zeros(2), 1.0, 0.1), [0.05, 0.95])


def test_values_by_domain_name_what_is_wrong() -> None:
    with pytest.raises(UserError, match=r"targets names 'pyhton'(.|\n)*did you mean 'python'"):
        by_domain({"pyhton": 1.0}, ["python"], "targets")
    with pytest.raises(UserError, match="no value for domain 'b'"):
        by_domain({"a": 1.0}, ["a", "b"], "targets")
    with pytest.raises(UserError, match="of domain 'a' is nan"):
        by_domain({"a": math.nan}, ["a"], "targets")


def test_velocitune_with_true_targets_ends_at_natural_exposure() -> None:
    """Without transfer between domains and with ideal targets, many updates bring every domain to its target together,
    which is the natural mixture: what the method can gain must come from order and transfer."""
    rng = np.random.default_rng(3)
    natural = rng.dirichlet(np.full(7, 3.0))
    limit, scale, exponent = rng.uniform(1, 2, 7), rng.uniform(0.5, 3, 7), rng.uniform(0.2, 0.6, 7)

    def losses(seen: np.ndarray) -> np.ndarray:
        return limit + scale * (1 + 100 * seen) ** -exponent

    updates = 2000
    mixer = VelocituneMixer([f"d{i}" for i in range(7)], np.full(7, 1 / 7), losses(natural), losses(np.zeros(7)))
    seen_share = np.zeros(7)
    for step in range(updates):
        seen_share += mixer.weights / updates
        mixer.update(Observation(step, losses=losses(seen_share)))
    np.testing.assert_allclose(seen_share, natural, rtol=0.05)
    assert np.std(mixer.velocities) < 0.01

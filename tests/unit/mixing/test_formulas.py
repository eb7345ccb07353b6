"""The update rules that follow the losses, each written down a second time from its paper, on plain numbers.

A fault in a sign, a factor, an exponent, a shift or a border of a rule must not pass here: the losses are made from
known laws, the borders are stepped on, and every setting has a value of its own.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.mixing.mixers.ado import ADOMixer
from rewarm.mixing.mixers.aioli import AioliMixer, AioliRounds, interaction_matrix, tells_apart
from rewarm.mixing.mixers.base import Observation
from rewarm.mixing.mixers.doremi import DoReMiMixer
from rewarm.mixing.mixers.dynamic_batch_loading import DynamicBatchLoadingMixer
from rewarm.mixing.mixers.odm import ODMMixer
from rewarm.mixing.mixers.velocitune import VelocituneMixer
from rewarm.mixing.power_law import fit_power_law

NAMES = ["a", "b", "c"]
W = [0.5, 0.3, 0.2]


# ADO: rho ~ mu h^s max(alpha, 0.05) (loss - epsilon) / n, p = (1 - g) mean + g rho (Jiang et al. 2024, section 3).

LAWS = [(1.2, 8.0, 0.4), (0.7, 3.0, 0.2), (2.0, 1.5, 0.03)]
"""Limit, scale and exponent of each domain's loss; the last exponent is below the least that counts, 0.05."""
COUNTS = [[700, 200, 100], [300, 300, 400], [500, 400, 100], [100, 100, 800], [600, 300, 100], [250, 250, 500],
          [900, 50, 50], [200, 500, 300], [400, 400, 200]]  # fmt: skip


def ado_by_hand(
    warmup: int, smoothing: float, decay: float, power: float, floor: float
) -> list[tuple[int, list[float], list[float]]]:
    """Step, losses and expected weights of each update; what comes before the end of the warm-up is counted in n, and
    its losses are not of the law."""
    credit, mean, times, seen = list(W), list(W), 0, 0
    rows, n = [], 0
    for step, counts in enumerate(COUNTS, start=1):
        n += sum(counts)
        if step <= warmup:
            rows.append((step, [9.0, 0.1, 5.0], list(W)))
            continue
        seen += 1
        credit = [decay * h + (1 - decay) * c / sum(counts) for h, c in zip(credit, counts, strict=True)]
        expected = list(W)
        if seen >= 4:
            rho = [mu * h**power * max(alpha, 0.05) * scale * n**-alpha / n
                   for mu, h, (_, scale, alpha) in zip(W, credit, LAWS, strict=True)]  # fmt: skip
            rho = [value / sum(rho) for value in rho]
            expected = [(1 - smoothing) * m + smoothing * r for m, r in zip(mean, rho, strict=True)]
            times += 1
            mean = [m + (r - m) / (times + 1) for m, r in zip(mean, rho, strict=True)]
            low = [value < floor for value in expected]  # one round is enough for these numbers
            spare = (1 - floor * sum(low)) / sum(v for v, is_low in zip(expected, low, strict=True) if not is_low)
            expected = [floor if is_low else v * spare for v, is_low in zip(expected, low, strict=True)]
        rows.append((step, [limit + scale * n**-alpha for limit, scale, alpha in LAWS], expected))
    return rows


@pytest.mark.parametrize(
    ("warmup", "smoothing", "decay", "power", "floor"),
    [(0, 0.1, 0.9, 0.5, 0.01), (2, 0.1, 0.9, 0.5, 0.01), (1, 1.0, 0.6, 0.8, 0.15), (0, 0.7, 0.0, 0.0, 0.0)],
)
def test_ado(warmup: int, smoothing: float, decay: float, power: float, floor: float) -> None:
    mixer = ADOMixer(
        NAMES, np.array(W),
        warmup=warmup, smoothing=smoothing, credit_decay=decay, credit_power=power, floor=floor,
    )  # fmt: skip
    changed = 0
    for step, losses, expected in ado_by_hand(warmup, smoothing, decay, power, floor):
        counts = np.array(COUNTS[step - 1])
        found = mixer.update(Observation(step, training_losses=np.array(losses), training_counts=counts))
        assert found == pytest.approx(expected, abs=2e-4), step
        changed += expected != W
        assert mixer.note == ("" if expected != W or step <= warmup else "too few losses for a scaling law")
    assert changed == len(COUNTS) - warmup - 3
    assert floor == 0.01 or mixer.weights.min() >= floor - 1e-12


def test_ado_leaves_out_what_was_not_drawn_and_waits_for_every_domain() -> None:
    mixer = ADOMixer(["x", "y"], np.array([3.0, 1.0]), warmup=0)
    for step in range(1, 9):
        losses = np.array([1 + 5 * (1000.0 * step) ** -0.3, math.nan if step in (2, 3) else 1 + 5 * step**-0.3])
        found = mixer.update(Observation(step, training_losses=losses, training_counts=np.array([1000, 0])))
        assert (found.tolist() == [0.75, 0.25]) == (step < 6)  # y has 4 losses at step 6
    assert [len(points) for points in mixer.history] == [8, 6]
    assert [point[0] for point in mixer.history[1]] == [1000, 4000, 5000, 6000, 7000, 8000]
    nothing = ADOMixer(["x"], np.ones(1), warmup=0)
    assert nothing.update(
        Observation(1, training_losses=np.array([math.nan]), training_counts=np.array([0]))
    ).tolist() == [1.0]


def test_ado_counts_what_little_is_left_to_learn() -> None:
    """A thousandth of a nat that is left is a thousandth, and not rounded up."""
    mixer = ADOMixer(["x", "y"], np.ones(2), warmup=0, smoothing=1.0, floor=0.0)
    for step in range(1, 6):
        losses = np.array([1 + scale * (1000.0 * step) ** -0.4 for scale in (8.0, 0.02)])
        found = mixer.update(Observation(step, training_losses=losses, training_counts=np.array([500, 500])))
    assert found == pytest.approx([8 / 8.02, 0.02 / 8.02], rel=1e-2)


@pytest.mark.parametrize(
    ("weights", "floor", "expected"),
    [
        ([0.005, 0.195, 0.8], 0.01, [0.01, 0.195 * 0.99 / 0.995, 0.8 * 0.99 / 0.995]),
        # Scaling the others down takes the second below the floor too.
        ([0.001, 0.01005, 0.98895], 0.01, [0.01, 0.01, 0.98]),
        ([0.01, 0.19, 0.8], 0.01, [0.01, 0.19, 0.8]),
        ([0.2, 0.3, 0.5], 0.5, [0.2, 0.3, 0.5]),  # a floor that cannot be
    ],
)
def test_ados_floor(weights: list[float], floor: float, expected: list[float]) -> None:
    from rewarm.mixing.mixers.ado import _floored

    assert _floored(np.array(weights), floor) == pytest.approx(expected, abs=1e-12)


# Velocitune: V = clip((l - l*) / (l0 - l*), 0, 1), w <- w exp(V) / sum (Luo et al. 2024, equations 3 to 5).


@pytest.mark.parametrize(
    ("initial", "target", "loss", "margin", "velocity"),
    [
        (2.0, 1.0, 1.75, 0.0, 0.75),
        (2.0, 1.0, 2.5, 0.0, 1.0),  # worse than at the start
        (2.0, 1.0, 0.5, 0.0, 0.0),  # past its target
        (2.0, 1.0, 1.0, 0.0, 0.0),
        (2.0, 2.0, 2.5, 0.0, 0.0),  # at its target from the start: nothing to divide by
        (2.0, 2.0, 1.5, 0.0, 0.0),
        (2.0, 2.5, 2.25, 0.0, 0.0),  # below its target from the start, where the ratio would be a half
        (2.0, 1.75, 1.875, 0.25, 0.0),  # just at the margin
        (2.0, 1.75, 1.875, 0.2, 0.5),
    ],
)
def test_velocitune(initial: float, target: float, loss: float, margin: float, velocity: float) -> None:
    mixer = VelocituneMixer(
        ["x", "y"], np.array([0.25, 0.75]), np.array([target, 1.0]), np.array([initial, 3.0]),
        step_size=0.7, floor=0.1, learned_margin=margin,
    )  # fmt: skip
    with np.errstate(all="raise"):
        found = mixer.update(Observation(8, losses=np.array([loss, 1.5])))
    assert mixer.velocities.tolist() == pytest.approx([velocity, 0.25])
    powers = [0.25 * math.exp(0.7 * velocity), 0.75 * math.exp(0.7 * 0.25)]
    assert found == pytest.approx([0.9 * power / sum(powers) + 0.05 for power in powers])
    assert mixer.note == ("already at the target when the stage began: x" if initial - target <= margin else "")
    # The next update starts from these weights, and from the same initial losses.
    again = mixer.update(Observation(16, losses=np.array([loss, 1.5])))
    powers = [w * math.exp(0.7 * v) for w, v in zip(found, [velocity, 0.25], strict=True)]
    assert again == pytest.approx([0.9 * power / sum(powers) + 0.05 for power in powers])


def test_excess_losses_weigh_with_their_sign_or_clipped() -> None:
    losses, target = np.array([1.0, 2.0, 3.0]), np.array([1.4, 1.9, 2.5])
    excess = [-0.4, 0.1, 0.5]
    for mixer, kept in (
        (DynamicBatchLoadingMixer(NAMES, np.array(W), target, step_size=2.0, floor=0.3), excess),
        (DoReMiMixer(NAMES, np.array(W), target, step_size=2.0, floor=0.3), [max(e, 0) for e in excess]),
    ):
        powers = [w * math.exp(2 * e) for w, e in zip(W, kept, strict=True)]
        expected = [0.7 * power / sum(powers) + 0.1 for power in powers]
        assert mixer.update(Observation(1, losses=losses)) == pytest.approx(expected)


# ODM: R <- a R + (1 - a) loss / pi, e_t = min(1/K, sqrt(ln K / (K t))), pi = (1 - K e_t) softmax(e_{t-1} R) + e_t
# (Albalak et al. 2023, algorithm 1).


@given(
    st.integers(2, 3),
    st.integers(0, 8),
    st.lists(st.lists(st.floats(0.1, 9), min_size=3, max_size=3), min_size=1, max_size=6),
    st.floats(0, 0.95),
    st.integers(1, 5),
)
def test_odm(count: int, warmup: int, table: list[list[float]], decay: float, every: int) -> None:
    mixer = ODMMixer(NAMES[:count], np.array(W[:count]), decay=decay, warmup=warmup)
    weights = [weight / sum(W[:count]) for weight in W[:count]]
    rewards, before = [0.0] * count, 1 / count
    for number, losses in enumerate(table):
        step = number * every
        found = mixer.update(Observation(step, training_losses=np.array(losses[:count])))
        rewards = [decay * r + (1 - decay) * loss / w for r, loss, w in zip(rewards, losses, weights, strict=False)]
        if step >= warmup:
            rate = min(1 / count, math.sqrt(math.log(count) / (count * step))) if step else 1 / count
            largest = max(rewards)
            powers = [math.exp(before * (r - largest)) for r in rewards]
            weights = [(1 - count * rate) * power / sum(powers) + rate for power in powers]
            before = rate
        assert found == pytest.approx(weights, abs=1e-9)
        assert mixer.rewards.tolist() == pytest.approx(rewards) and mixer.exploration == pytest.approx(before)


@pytest.mark.parametrize(("step", "moves"), [(99, False), (100, True), (101, True)])
def test_odm_moves_from_the_last_step_of_its_warmup_on(step: int, moves: bool) -> None:
    mixer = ODMMixer(NAMES, np.array(W), warmup=100)
    found = mixer.update(Observation(step, training_losses=np.array([1.0, 2.0, 3.0])))
    assert (found.tolist() != W) == moves and mixer.rewards.tolist() == pytest.approx([0.2, 2 / 3, 1.5])
    assert mixer.exploration == pytest.approx(math.sqrt(math.log(3) / (3 * step)) if moves else 1 / 3)


def test_odm_of_one_domain_and_of_one_that_was_not_drawn() -> None:
    assert ODMMixer(["x"], np.ones(1)).update(Observation(5, training_losses=np.array([2.0]))).tolist() == [1.0]
    mixer = ODMMixer(["x", "y"], np.array([1.0, 0.0]))
    assert mixer.warmup == 0  # nothing is waited for where nothing is said
    mixer.rewards = np.array([0.5, 0.25])
    mixer.update(Observation(50, training_losses=np.array([2.0, 3.0])))
    # y has no share: a loss over a share of 0 is no reward.
    assert mixer.rewards.tolist() == pytest.approx([0.9 * 0.5 + 0.1 * 2.0, 0.25])


# Aioli: A from B = P A^T, A - min(0, min A), A / sum A, w = softmax(eta * column sums) (Chen et al. 2024, algorithm 2).


@pytest.mark.parametrize(
    ("interaction", "columns"),
    [
        ([[0.4, 0.1], [0.1, 0.2]], [0.5 / 0.8, 0.3 / 0.8]),  # nothing negative: no shift
        ([[0.4, -0.2], [0.1, 0.3]], [0.9 / 1.4, 0.5 / 1.4]),  # the least becomes 0
        ([[-0.1, -0.5], [-0.2, -0.4]], [0.7 / 0.8, 0.1 / 0.8]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
    ],
)
def test_aiolis_matrix_is_shifted_and_scaled(interaction: list[list[float]], columns: list[float]) -> None:
    mixes = np.array([[0.625, 0.375], [0.2, 0.8], [0.5, 0.5]])
    # Row p of B is P_p A^T: what a probe's mixture lowers loss j by.
    drops = np.array([[sum(p * a for p, a in zip(mix, row, strict=True)) for row in interaction] for mix in mixes])
    found = interaction_matrix(mixes, drops)
    assert found.sum(axis=0) == pytest.approx(columns, abs=1e-9)
    shifted = np.array(interaction) - min(0.0, *interaction[0], *interaction[1])
    np.testing.assert_allclose(found, shifted / max(shifted.sum(), 1e-9), atol=1e-9)
    weights = AioliMixer(["x", "y"], np.ones(2), step_size=3.0).update(
        Observation(1, probe_mixes=mixes, probe_drops=drops)
    )
    powers = [math.exp(3 * column) for column in columns]
    assert weights == pytest.approx([power / sum(powers) for power in powers])


def test_given_probes_are_weighed_like_those_of_a_run() -> None:
    assert AioliMixer(["x", "y"], np.ones(2)).step_size == AioliRounds(["x", "y"], np.ones(2)).step_size


def test_probes_tell_domains_apart_from_a_twentieth_on() -> None:
    assert tells_apart(np.diag([1.0, 0.05])) and not tells_apart(np.diag([1.0, 0.0499]))
    assert not tells_apart(np.array([[0.5, 0.5]])) and not tells_apart(np.array([[0.5, 0.5]] * 5))


def test_a_run_of_aioli_is_solved_from_what_was_trained_on_per_token() -> None:
    """Three domains, intervals of unequal length and mixtures that are not quite the ones asked for."""
    mixer = AioliRounds(NAMES, np.array(W), step_size=2.0, probe_share=0.6, probes_per_domain=2, hold=3)
    counts = np.array([[900, 150, 50], [40, 350, 60], [100, 90, 500], [800, 100, 100], [60, 700, 90], [30, 50, 420]])
    interaction = np.array([[3.0, 0.2, 0.1], [0.4, 2.0, -0.3], [0.1, 0.5, 1.0]]) * 1e-4
    losses = np.array([6.0, 5.0, 4.0])
    notes, chosen = [], []
    for step in range(6):
        trained = counts[step - 1] if step else np.array([7, 1, 1])
        found = mixer.update(Observation(step, losses=losses, training_counts=trained))
        assert sorted(found.tolist()) == pytest.approx([0.2, 0.2, 0.6])
        chosen.append(NAMES[int(found.argmax())])
        notes.append(mixer.note)
        losses = losses - interaction @ counts[step]
    assert sorted(chosen[:3]) == sorted(chosen[3:]) == NAMES and notes == [f"probe of {name}" for name in chosen]
    found = mixer.update(Observation(6, losses=losses, training_counts=counts[5]))
    # P: shares of what was trained on. B: falls of the losses per token. Solved by the normal equations.
    shares = counts / counts.sum(axis=1, keepdims=True)
    falls = counts @ interaction.T / counts.sum(axis=1, keepdims=True)
    matrix = (np.linalg.inv(shares.T @ shares) @ shares.T @ falls).T
    np.testing.assert_allclose(matrix, interaction, atol=1e-12)
    matrix = matrix + 0.3e-4
    columns = matrix.sum(axis=0) / matrix.sum()
    powers = np.exp(2.0 * columns)
    assert found == pytest.approx(powers / powers.sum(), abs=1e-9) and mixer.note == "mixture from 6 probes"
    mixer.adopt(found)
    for step in (7, 8):
        held = mixer.update(Observation(step, losses=losses - step, training_counts=counts[0]))
        assert mixer.note == "mixture held" and held == pytest.approx(found)
    # It held for three intervals; what was trained on in them is no probe's.
    probed = mixer.update(Observation(9, losses=losses - 9, training_counts=counts[1]))
    assert mixer.note.startswith("probe of") and max(probed) == pytest.approx(0.6) and mixer.mixes == []
    mixer.update(Observation(10, losses=losses - 9.5, training_counts=counts[2]))
    assert mixer.mixes == [pytest.approx(shares[2])] and mixer.drops == [pytest.approx([0.5 / 690] * 3)]
    # An interval in which nothing new was trained on tells nothing.
    mixer.update(Observation(11, losses=losses, training_counts=np.zeros(3, dtype=np.int64)))
    assert len(mixer.mixes) == 1
    assert AioliRounds(["x"], np.ones(1)).update(
        Observation(1, losses=np.ones(1), training_counts=np.ones(1, dtype=np.int64))
    ).tolist() == [1.0]


# The power law behind ADO and the targets: loss = limit + scale * n ** -exponent.


@pytest.mark.parametrize(("limit", "scale", "exponent"), [(1.2, 8.0, 0.4), (0.0, 3.0, 0.05), (2.0, 500.0, 1.5)])
def test_the_numbers_of_a_power_law(limit: float, scale: float, exponent: float) -> None:
    amounts = np.array([100.0, 250.0, 700.0, 1500.0, 4000.0, 9000.0])
    losses = limit + scale * amounts**-exponent
    law = fit_power_law(amounts, losses)
    assert (law.limit, law.scale, law.exponent) == pytest.approx((limit, scale, exponent), rel=1e-3, abs=2e-3)
    assert law(400.0) == pytest.approx(limit + scale * 400**-exponent, rel=1e-5)
    losses[2] += 0.25
    moved = fit_power_law(amounts, losses)
    assert moved.residuals[2] == pytest.approx(-0.25, abs=0.01) and moved.worst_residual == -moved.residuals[2]

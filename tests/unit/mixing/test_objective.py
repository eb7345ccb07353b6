"""The loss can stand for another mixture than the one that is sampled."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.config.mixture import MixtureConfig
from rewarm.errors import UserError
from rewarm.mixing.mixture import planned_entry
from rewarm.mixing.objective import Objective, is_estimable, objective_weights
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import TOTAL, quantise

NAMES = ["a", "b", "old"]
SAMPLED = dict(zip(NAMES, quantise([0.5, 0.25, 0.25]).tolist(), strict=True))


def entry(sample: int, objective: dict[str, float] | None) -> WeightEntry:
    return WeightEntry(sample, SAMPLED, "", None if objective is None else objective_weights(objective, SAMPLED))


def test_named_domains_share_what_they_are_sampled_at_and_replay_counts_once() -> None:
    shares = objective_weights({"a": 1, "b": 3}, SAMPLED)
    assert [round(share / TOTAL, 8) for share in shares.values()] == [0.1875, 0.5625, 0.25]
    factors = Objective(NAMES)
    factors.schedule(entry(0, {"a": 1, "b": 3}))
    assert factors.factors(0, np.array([0, 1, 2])) == pytest.approx([0.375, 2.25, 1.0], abs=1e-8)
    named = objective_weights({"a": 1, "b": 1, "old": 2}, SAMPLED)
    assert [round(share / TOTAL, 8) for share in named.values()] == [0.25, 0.25, 0.5]


@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=8),
    st.lists(st.floats(0, 10), min_size=8, max_size=8).filter(lambda x: max(x[:2]) > 0.1),
)
def test_the_expectation_is_the_mean_under_the_objective(sampled: list[float], wanted: list[float]) -> None:
    """The weighted mean over the samples of a long stretch is the mean loss under the wanted mixture."""
    names = [str(number) for number in range(len(sampled))]
    weights = quantise(sampled)
    objective = dict(zip(names, wanted, strict=False))
    shares = objective_weights(objective, dict(zip(names, weights.tolist(), strict=True)))
    assert sum(shares.values()) == TOTAL
    factors = Objective(names)
    factors.schedule(WeightEntry(0, dict(zip(names, weights.tolist(), strict=True)), "", shares))
    count = 5000
    draw = Sampler([SampledDomain(name, 50, name) for name in names], 1, weights).draw(count)
    losses = np.arange(1.0, len(names) + 1)
    found = factors.factors(0, draw.domains)
    assert found is not None
    target = np.array(list(objective.values())) / sum(objective.values())
    # Each domain's count is within a sample or two of its share, and each sample counts at most 1 / q times.
    slack = 2 * (losses * target / weights * TOTAL).sum() / count
    assert (found * losses[draw.domains]).mean() == pytest.approx(float(target @ losses), abs=slack)


def test_changes_take_effect_at_their_sample_and_survive_a_checkpoint() -> None:
    objective = Objective(NAMES)
    for change in (entry(0, None), entry(4, {"a": 0, "b": 1}), entry(10, None), entry(20, {"a": 1})):
        objective.schedule(change)
    domains = np.array([0, 1] * 6)
    assert objective.factors(0, domains[:4]) is None
    found = objective.factors(0, domains)
    assert found == pytest.approx([1, 1, 1, 1, 0, 3, 0, 3, 0, 3, 1, 1], abs=1e-8)
    shares = [objective.shares(sample) for sample in (3, 4, 9, 10)]
    assert shares[0] is None and shares[3] is None
    assert shares[1] == pytest.approx([0, 0.75, 0.25], abs=1e-9) and np.array_equal(shares[1], shares[2])
    again = Objective(NAMES)
    again.load_state_dict(json.loads(json.dumps(objective.state_dict(6))))
    np.testing.assert_array_equal(again.factors(6, domains), objective.factors(6, domains))
    assert again.shares(25) == pytest.approx(objective.shares(25))
    assert len(objective.state_dict(6)) == 3  # what no later sample needs is left out


def test_what_cannot_be_estimated_is_refused_or_left_out() -> None:
    mixture = MixtureConfig.model_validate({"objective": {"a": 1, "x": 1}})
    with pytest.raises(UserError, match="objective names 'x'"):
        planned_entry(mixture, 0, NAMES, quantise([1, 1, 1]), "start")
    mixture = MixtureConfig.model_validate({"objective": {"a": 1, "b": 1}})
    with pytest.raises(UserError, match=r"'b' the weight 1.0, but nothing is sampled from it \(phase 0\)"):
        planned_entry(mixture, 8, NAMES, quantise([1, 0, 1]), "phase 0")
    # A cap on passes that a running stage meets: what is left of the objective stands in.
    kept = objective_weights({"a": 1, "b": 1}, {"a": TOTAL // 2, "b": 0, "old": TOTAL // 2})
    assert kept == {"a": TOTAL // 2, "b": 0, "old": TOTAL // 2}
    # Nothing of it is left: every window counts once, also those of a domain that it gave no weight.
    for gone in ({"a": 1}, {"a": 1, "b": 0}, {"a": 1, "old": 0}):
        sampled = {"a": 0, "b": TOTAL // 4, "old": 3 * TOTAL // 4}
        assert objective_weights(gone, sampled) == sampled and not is_estimable(gone, sampled)
        assert objective_weights(gone, sampled) is not sampled
    assert is_estimable({"a": 1, "b": 1}, {"a": 0, "b": TOTAL})
    with pytest.raises(ValueError, match="sum to 0"):
        MixtureConfig.model_validate({"objective": {"a": 0}})
    with pytest.raises(ValueError, match="objective is ignored by mixture.mixer=doremi"):
        MixtureConfig.model_validate(
            {"mixer": "doremi", "objective": {"a": 1}, "doremi": {"reference": {"a": 1.0, "b": 1.0}}}
        )

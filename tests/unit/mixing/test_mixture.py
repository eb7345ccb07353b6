"""The mixture a stage starts with."""

from __future__ import annotations

import pytest

from rewarm.config.load import build
from rewarm.config.mixture import ConditioningConfig, MixtureConfig, ReplayConfig
from rewarm.errors import UserError
from rewarm.mixing.clock import Clock
from rewarm.mixing.mixture import cooldown_sample, initial_weights, planned_changes
from rewarm.mixing.weights import TOTAL


def test_replay_replaces_new_tokens() -> None:
    names, weights = initial_weights(
        MixtureConfig(weights={"b": 3, "a": 1}), ReplayConfig(fraction=0.25), {"a": 10, "b": 10}, {"old": 3, "older": 1}
    )
    assert names == ["a", "b", "old", "older"]
    # 3/4 is shared 1:3 by the new domains, 1/4 is shared 3:1 by the replayed ones.
    assert (weights * 16).tolist() == [3 * TOTAL, 9 * TOTAL, 3 * TOTAL, TOTAL]


def test_without_weights_domains_are_equal_and_proportional_follows_tokens() -> None:
    assert initial_weights(MixtureConfig(), ReplayConfig(), {"a": 1, "b": 7})[1].tolist() == [TOTAL // 2, TOTAL // 2]
    weights = initial_weights(MixtureConfig(mixer="proportional"), ReplayConfig(), {"a": 1, "b": 7})[1]
    assert weights.tolist() == [TOTAL // 8, 7 * TOTAL // 8]


def test_replay_without_a_domain_to_replay_is_refused() -> None:
    with pytest.raises(UserError, match="no domain to replay"):
        initial_weights(MixtureConfig(), ReplayConfig(fraction=0.1), {"a": 1}, {})
    with pytest.raises(UserError, match="sum to 0"):
        initial_weights(MixtureConfig(), ReplayConfig(fraction=0.1), {"a": 1}, {"old": 0.0})


TOKENS = {"a": 900, "b": 90, "c": 10}


def clock(total_steps: int = 100) -> Clock:
    """100 steps of 8 samples; the learning rate warms up to step 10 and falls linearly to 0 at step 110."""
    steps = {"50%": total_steps // 2, "7 steps": 7, "100 steps": 100}
    return Clock(total_steps, 8, steps.__getitem__, lambda step: min((step + 1) / 10, (110 - step) / 100))


def test_temperature_and_its_cooldown() -> None:
    mixture = MixtureConfig.model_validate(
        {"mixer": "temperature", "temperature": {"temperature": 5, "cooldown_at": "50%"}}
    )
    weights = initial_weights(mixture, ReplayConfig(), TOKENS)[1] / TOTAL
    assert weights == pytest.approx([0.490787, 0.309666, 0.199547], abs=1e-6)
    (entry,) = planned_changes(mixture, ReplayConfig(), TOKENS, {}, clock())
    assert entry.sample == 50 * 8
    assert [w / TOTAL for w in entry.weights.values()] == pytest.approx([0.9, 0.09, 0.01])


def test_unimax_counts_only_what_replay_leaves() -> None:
    mixture = MixtureConfig.model_validate({"mixer": "unimax", "unimax": {"max_epochs": 2}})
    names, weights = initial_weights(mixture, ReplayConfig(fraction=0.5), TOKENS, {"old": 1.0}, total_tokens=600)
    # 300 tokens for the new domains: 2 passes of c are 20, the rest is shared, 140 each.
    assert dict(zip(names, weights / TOTAL, strict=True)) == pytest.approx(
        {"a": 140 / 600, "b": 140 / 600, "c": 20 / 600, "old": 0.5}
    )


def test_phases_begin_where_their_triggers_say() -> None:
    blends = [{"a": 1, "b": 0, "c": 0}, {"a": 0, "b": 1, "c": 1}]
    phases = [{"weights": blends[0], "learning_rate_fraction": 0.2}, {"weights": blends[1], "at": "7 steps"}]
    mixture = MixtureConfig.model_validate({"mixer": "phased", "phased": {"phases": phases}})
    entries = planned_changes(mixture, ReplayConfig(fraction=0.5), TOKENS, {"old": 2.0}, clock())
    # (110 - step) / 100 is 0.2 at step 90; the warm-up's low rates do not count.
    assert [entry.sample for entry in entries] == [7 * 8, 90 * 8]
    assert entries[0].weights == {"a": 0, "b": TOTAL // 4, "c": TOTAL // 4, "old": TOTAL // 2}
    assert entries[1].weights == {"a": TOTAL // 2, "b": 0, "c": 0, "old": TOTAL // 2}


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        ({"at": "100 steps"}, "the stage has 100 steps"),
        ({"learning_rate_fraction": 0.05}, "the lowest after it is 0.11"),
    ],
)
def test_a_phase_that_never_begins_is_refused(trigger: dict[str, object], message: str) -> None:
    phases = [{"weights": {"a": 1, "b": 1, "c": 1}, **trigger}]
    mixture = MixtureConfig.model_validate({"mixer": "phased", "phased": {"phases": phases}})
    with pytest.raises(UserError, match=message):
        planned_changes(mixture, ReplayConfig(), TOKENS, {}, clock())


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"mixer": "velocitune"}, "mixture.mixer=velocitune needs mixture.velocitune.targets"),
        ({"odm": {}}, "mixture.odm is ignored by mixture.mixer=static"),
        ({"mixer": "unimax", "weights": {"a": 1}}, "mixture.weights is ignored by mixture.mixer=unimax"),
        ({"weights": {"a": 1, "b": 1}}, "mixture.weights names 'b', which is not in data"),
        ({"weights": {"a": -1}}, "weight of domain 'a' in mixture.weights is -1"),
        ({"weights": {"a": 0}}, "mixture.weights sum to 0"),
        ({"mixer": "phased", "phased": {"phases": [{"weights": {"a": 1}}]}}, "exactly one of"),
        ({"mixer": "phased", "phased": {"phases": [{"weights": {"z": 1}, "at": "5%"}]}}, "names 'z', which is not in"),
        ({"mixer": "temperature", "temperature": {"cooldown_temperature": 2}}, "ignored without cooldown_at"),
        ({"mixer": "velocitun"}, "velocitun"),
        ({"mixer": "velocitune", "velocitune": {"targets": {"a": 1}, "eta": 1}}, "unknown setting mixture.velocitune"),
    ],
)
def test_contradictions_in_the_configuration_are_refused(mixture: dict[str, object], message: str) -> None:
    model = {"hidden_size": 8, "num_layers": 1, "num_attention_heads": 1, "ffn_hidden_size": 8}
    with pytest.raises(UserError, match=message):
        build({"name": "x", "data": {"a": "/a"}, "model": model, "mixture": mixture})


def test_evaluations_that_steer_must_be_made() -> None:
    values = {"name": "x", "data": {"a": "/a"}, "parent": "/p", "mixture": {"mixer": "odm"}}
    build(values)
    with pytest.raises(UserError, match="mixture.mixer=odm changes weights at evaluations, but evaluation.interval"):
        build({**values, "evaluation": {"interval": None}})


def test_the_cooldown_of_conditioning_begins_at_its_trigger() -> None:
    def begins(**trigger: object) -> int:
        return cooldown_sample(ConditioningConfig.model_validate({"prefixes": {"a": "x"}, **trigger}), clock())

    assert begins(until="50%") == 50 * 8
    assert begins(until="7 steps") == 7 * 8
    # It falls linearly from step 10 to 0 at step 110: to a fifth at step 90.
    assert begins(until_learning_rate_fraction=0.2) == 90 * 8
    with pytest.raises(UserError, match=r"conditioning.until=100 steps is step 100"):
        begins(until="100 steps")
    with pytest.raises(UserError, match=r"conditioning waits for 0.05 of the peak"):
        begins(until_learning_rate_fraction=0.05)

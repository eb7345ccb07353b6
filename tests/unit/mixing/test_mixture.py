"""The mixture a stage starts with."""

from __future__ import annotations

import pytest

from rewarm.config.mixture import MixtureConfig, ReplayConfig
from rewarm.errors import UserError
from rewarm.mixing.mixture import initial_weights
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

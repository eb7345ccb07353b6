"""The mixture a stage starts with: new domains by the mixer's rule, replay in place of a share of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rewarm.config.mixture import MixtureConfig, ReplayConfig
from rewarm.errors import UserError
from rewarm.mixing.weights import check_weights, quantise


def initial_weights(
    mixture: MixtureConfig, replay: ReplayConfig, tokens: Mapping[str, int], replayed: Mapping[str, float] | None = None
) -> tuple[list[str], np.ndarray]:
    """Integer weights of a stage's first sample.

    Replay takes its fraction from the new domains, whose weights shrink by ``1 - fraction``: the number of tokens
    trained on does not change (compute-equivalent replay, Ibrahim et al. 2024).

    Args:
        mixture: how the new domains share what replay leaves.
        replay: the fraction that is replayed.
        tokens: training tokens of each new domain, in the order of the configuration.
        replayed: proportion of each replayed domain, any scale; see :func:`rewarm.replay.select.resolve_replay`.

    Returns:
        Names (new domains first, then replayed ones) and int64 [K] summing to 2^32.

    Raises:
        UserError: if the weights are no mixture, or replay is asked for and nothing can be replayed.
    """
    replayed = replayed or {}
    if replay.fraction > 0 and not replayed:
        raise UserError(
            f"replay.fraction={replay.fraction}, but the lineage has no domain to replay",
            fix="set replay.fraction=0, or name the old data under data and give it a weight",
        )
    return blend(new_shares(mixture, tokens), replayed, replay.fraction)


def new_shares(mixture: MixtureConfig, tokens: Mapping[str, int]) -> dict[str, float]:
    """Weights of the new domains among themselves, any scale."""
    if mixture.mixer == "proportional":
        return {name: float(count) for name, count in tokens.items()}
    weights = mixture.weights or dict.fromkeys(tokens, 1.0)
    return {name: weights[name] for name in tokens}


def blend(
    new: Mapping[str, float], replayed: Mapping[str, float], replay_fraction: float
) -> tuple[list[str], np.ndarray]:
    """Join new and replayed domains, each at its own scale, so that replay has the given fraction of all samples.

    Returns:
        Names and int64 [K] summing to 2^32.
    """
    clash = sorted(set(new) & set(replayed))
    assert not clash, f"domain {clash[0]!r} is both new and replayed"
    shares = _scaled(new, 1 - replay_fraction)
    if replay_fraction > 0:
        shares |= _scaled(replayed, replay_fraction)
    else:
        shares |= dict.fromkeys(replayed, 0.0)
    return list(shares), quantise(list(shares.values()))


def _scaled(weights: Mapping[str, float], share: float) -> dict[str, float]:
    check_weights(list(weights.values()), list(weights))
    total = sum(weights.values())
    return {name: share * weight / total for name, weight in weights.items()}

"""Repetition: what repeated tokens are worth, and weights that respect caps on passes."""

from __future__ import annotations

import math

import numpy as np

from rewarm.errors import UserError

HALF_LIFE_REPEATS = 15.387756
"""R*_D of Muennighoff et al., "Scaling Data-Constrained Language Models", 2023."""


def effective_tokens(unique: float, epochs: float, decay: float = HALF_LIFE_REPEATS) -> float:
    """How many fresh tokens several passes are worth: ``U + U R* (1 - exp(-R / R*))``, R repeats after the first pass.

    Args:
        unique: tokens of the domain, U.
        epochs: passes over it; below 1 nothing is repeated.
        decay: R*, the repeats after which a further one is worth 1/e of a fresh token.

    Returns:
        D', in tokens.
    """
    if epochs <= 1:
        return unique * epochs
    return unique + unique * decay * -math.expm1(-(epochs - 1) / decay)


def cap_weights(weights: np.ndarray, caps: np.ndarray) -> np.ndarray:
    """The nearest mixture under caps: what a capped domain cannot take goes to the others in proportion.

    Args:
        weights: float64 [K] summing to 1.
        caps: float64 [K]; largest share of each domain, infinity for none.

    Returns:
        float64 [K] summing to 1, each at most its cap.

    Raises:
        UserError: if the caps of the domains with a weight sum to less than 1.
    """
    capped = np.zeros(len(weights), dtype=bool)
    result = weights.copy()
    while (over := (result > caps * (1 + 1e-12)) & ~capped).any():
        capped |= over
        free = weights[~capped].sum()
        left = 1 - caps[capped].sum()
        if left < -1e-12 or (free == 0 and left > 1e-12):
            raise UserError(
                f"the domains with a weight may take {caps[weights > 0].sum():.4g} of the samples that are left",
                fix="raise max_epochs, shorten the stage, or give a domain without cap a weight",
            )
        result = np.where(capped, caps, weights * (left / free if free > 0 else 0.0))
    return result

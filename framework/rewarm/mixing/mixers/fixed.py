"""Mixers whose weights follow from the sizes of the domains: static, temperature and UniMax."""

from __future__ import annotations

import numpy as np

from rewarm.mixing.mixers.base import Mixer, Observation


class StaticMixer(Mixer):
    """The weights it starts with, for ever. Cost per update: nothing."""

    name = "static"

    def _next(self, observation: Observation) -> np.ndarray:
        return self.weights


def temperature_weights(tokens: np.ndarray, temperature: float) -> np.ndarray:
    """``tokens ** (1 / temperature)``, normalised: 1 is proportional, infinity equal (Conneau et al. 2019).

    Args:
        tokens: [K], positive.
        temperature: at least 1.

    Returns:
        float64 [K] summing to 1.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    powers = (tokens / tokens.max()) ** (1 / temperature)
    return powers / powers.sum()


def unimax_weights(tokens: np.ndarray, budget: float, max_epochs: float) -> np.ndarray:
    """As equal as a cap on passes allows (Chung et al., "UniMax", 2023, algorithm 1).

    From the smallest domain to the largest, each takes an equal share of what is left of the budget, or ``max_epochs``
    passes over it if that is less. When the budget exceeds the cap of all domains together, all are capped.

    Args:
        tokens: [K], positive; size of each domain.
        budget: tokens that will be trained on.
        max_epochs: cap.

    Returns:
        float64 [K] summing to 1.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    taken = np.zeros(len(tokens))
    left = float(budget)
    for place, index in enumerate(np.argsort(tokens, kind="stable")):
        taken[index] = min(left / (len(tokens) - place), max_epochs * tokens[index])
        left -= taken[index]
    return taken / taken.sum()

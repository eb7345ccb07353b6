"""UniMax: weights as equal as a cap on repetition allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
from pydantic import Field

from rewarm.config.registry import MIXERS
from rewarm.config.section import Section
from rewarm.mixing.mixers.base import MixerContext
from rewarm.mixing.mixers.static import StaticMixer


class UniMaxConfig(Section):
    """Weights as equal as a cap on repetition allows (Chung et al. 2023)."""

    max_epochs: float = Field(4.0, gt=0)
    """Most passes over each domain; what a small domain cannot take goes to the larger ones. The paper tries 1 to 10;
    repeating up to 4 times costs little (Muennighoff et al. 2023)."""


@MIXERS.register("unimax", settings=UniMaxConfig)
class UniMaxMixer(StaticMixer):
    """Chung et al., "UniMax: Fairer and More Effective Language Sampling for Large-Scale Multilingual Pretraining",
    2023. Cost per update: nothing."""

    name = "unimax"
    takes_weights = False

    @classmethod
    def build(cls, context: MixerContext, settings: UniMaxConfig) -> Self:
        """The settings have done their work in the weights it starts with."""
        return cls(context.names, context.weights)

    @classmethod
    def start(
        cls, settings: UniMaxConfig, given: Mapping[str, float] | None, tokens: Mapping[str, int], budget: float | None
    ) -> dict[str, float]:
        """By the tokens, capped over what the stage trains on."""
        assert budget is not None, "unimax needs the stage's tokens"
        sizes = np.array(list(tokens.values()), dtype=np.float64)
        return dict(zip(tokens, unimax_weights(sizes, budget, settings.max_epochs).tolist(), strict=True))


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

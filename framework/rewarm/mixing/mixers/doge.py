"""DoGE: weights by how well each domain's gradient serves the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field

from rewarm.config.registry import MIXERS
from rewarm.mixing.mixers.base import GradientSettings, Mixer, MixerContext, Observation, exponentiated_gradient


class DoGEConfig(GradientSettings):
    """More of what lowers the loss on the others too, by the inner products of gradients (Fan et al. 2023)."""

    learning_rate: float = Field(5e-4, gt=0)
    """Factor of the products, and a fifth of the largest score; the proxy's learning rate in the paper."""
    regularisation: float = Field(0.01, gt=0)
    """Strength of the pull towards the last weights; 0.01 in the published universal runs."""


@MIXERS.register("doge", settings=DoGEConfig)
class DoGEMixer(Mixer):
    """Fan et al., "DoGE: Domain Reweighting with Generalization Estimation", 2023 (universal generalization).

    Score of domain i: the inner product of its gradient with the sum of the other domains' gradients, over the mean
    gradient norm, times the learning rate and clipped to [0, 5 * learning rate] as in the published code;
    ``w <- w * exp(score / regularisation)``, normalised. The mean of the weights is the method's result.

    Cost per update: every domain's gradient and their inner products. State: weights, their sum and count.

    Args:
        names: K domains.
        weights: float64 [K].
        learning_rate: of the proxy model.
        regularisation: strength of the Bregman term; 0.01 in the published universal runs.
    """

    name = "doge"
    needs = ("gradient_products",)

    def __init__(
        self, names: Sequence[str], weights: np.ndarray, *, learning_rate: float = 5e-4, regularisation: float = 0.01
    ) -> None:
        super().__init__(names, weights)
        self.learning_rate, self.regularisation = learning_rate, regularisation
        self._sum, self._count = np.zeros(len(self.names)), 0

    @classmethod
    def build(cls, context: MixerContext, settings: DoGEConfig) -> Self:
        """Without the number of windows, which is the evaluation's."""
        return cls(
            context.names, context.weights,
            learning_rate=settings.learning_rate, regularisation=settings.regularisation,
        )  # fmt: skip

    def _next(self, observation: Observation) -> np.ndarray:
        products = observation.gradient_products
        assert products is not None
        norms = np.sqrt(np.diag(products))
        alignment = (products.sum(axis=1) - np.diag(products)) / max(float(norms.mean()), 1e-30)
        scores = np.clip(self.learning_rate * alignment, 0.0, 5 * self.learning_rate)
        weights = exponentiated_gradient(self.weights, scores, 1 / self.regularisation, 0.0)
        self._sum, self._count = self._sum + weights, self._count + 1
        return weights

    def details(self) -> dict[str, dict[str, float]]:
        """The mean of the weights."""
        return {"average": self._by_name(self._sum / self._count if self._count else self.weights)}

    def state_dict(self) -> dict[str, Any]:
        """Weights, their sum and count."""
        return super().state_dict() | {"sum": self._sum.tolist(), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self._sum, self._count = np.array(state["sum"], dtype=np.float64), int(state["count"])

"""PiKE: weights from gradient norms and variances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from pydantic import Field

from rewarm.config.registry import MIXERS
from rewarm.mixing.mixers.base import GradientSettings, Mixer, MixerContext, Observation, exponentiated_gradient


class PiKEConfig(GradientSettings):
    """More of what has a large gradient, less of what is mostly noise (Li et al. 2025); for domains whose gradients
    hardly conflict."""

    norm_factor: float = Field(1.0, ge=0)
    """Factor of the squared norm of a domain's gradient, zeta 1; no default is known to be right, as gradients scale
    with the model: try ``rewarm mixture simulate``."""
    variance_factor: float = Field(1.0, ge=0)
    """Factor of the gradient's variance over twice batch.global_batch_size, zeta 2."""


@MIXERS.register("pike", settings=PiKEConfig)
class PiKEMixer(Mixer):
    """Li et al., "PiKE: Adaptive Data Mixing for Large-Scale Multi-Task Learning Under Low Gradient Conflicts", 2025.

    ``w <- w * exp(norm_factor * |g|^2 - variance_factor * sigma^2 / (2 b))``, normalised: more of what still has a
    large gradient, less of what is mostly noise. It rests on gradients that hardly conflict.

    Cost per update: per-domain gradients, norms and variances. State: weights.

    Args:
        names: K domains.
        weights: float64 [K].
        batch_size: windows per step, b.
        norm_factor: zeta 1; no default is known to be right.
        variance_factor: zeta 2.
    """

    name = "pike"
    needs = ("squared_gradient_norms", "gradient_variances")

    def __init__(
        self,
        names: Sequence[str],
        weights: np.ndarray,
        *,
        batch_size: int = 64,
        norm_factor: float = 1.0,
        variance_factor: float = 1.0,
    ) -> None:
        super().__init__(names, weights)
        self.batch_size, self.norm_factor, self.variance_factor = batch_size, norm_factor, variance_factor

    @classmethod
    def build(cls, context: MixerContext, settings: PiKEConfig) -> Self:
        """With the stage's batch size."""
        return cls(
            context.names, context.weights,
            batch_size=context.batch_size, norm_factor=settings.norm_factor, variance_factor=settings.variance_factor,
        )  # fmt: skip

    def _next(self, observation: Observation) -> np.ndarray:
        norms, variances = observation.squared_gradient_norms, observation.gradient_variances
        assert norms is not None and variances is not None
        scores = self.norm_factor * norms - self.variance_factor * variances / (2 * self.batch_size)
        return exponentiated_gradient(self.weights, scores, 1.0, 0.0)

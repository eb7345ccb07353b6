"""Dynamic batch loading of Sheared LLaMA: weights grow with the excess over a target loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from pydantic import Field

from rewarm.config.registry import MIXERS
from rewarm.mixing.mixers.base import Mixer, MixerContext, Observation, exponentiated_gradient
from rewarm.mixing.mixers.target_settings import TargetSettings


class DynamicBatchLoadingConfig(TargetSettings):
    """Weights grow with the excess of the loss over its target (Xia et al. 2023, Sheared LLaMA)."""

    step_size: float = Field(1.0, gt=0)
    """Factor of the excess losses."""
    floor: float = Field(1e-4, ge=0, lt=1)
    """Share of the batch that is spread equally; the default is the published code's."""


@MIXERS.register("dynamic_batch_loading", settings=DynamicBatchLoadingConfig)
class DynamicBatchLoadingMixer(Mixer):
    """Xia et al., "Sheared LLaMA: Accelerating Language Model Pre-training via Structured Pruning", 2023.

    ``w <- w * exp(step_size * (l - l*))``, normalised, then a floor. The paper clips the excess at 0; its published
    code does not, and this follows the code.

    Cost per update: the held-out losses. State: weights.

    Args:
        names: K domains.
        weights: float64 [K].
        targets: float64 [K], nats per token.
        step_size: factor of the excess.
        floor: share spread equally; 1e-4 in the published code.
    """

    name = "dynamic_batch_loading"
    needs = ("losses",)

    def __init__(
        self,
        names: Sequence[str],
        weights: np.ndarray,
        targets: np.ndarray,
        *,
        step_size: float = 1.0,
        floor: float = 1e-4,
    ) -> None:
        super().__init__(names, weights)
        self.targets, self.step_size, self.floor = targets, step_size, floor

    @classmethod
    def build(cls, context: MixerContext, settings: DynamicBatchLoadingConfig) -> Self:
        """With the targets in the order of the domains."""
        targets = settings.by_domain(context.names, "mixture.dynamic_batch_loading.targets")
        return cls(context.names, context.weights, targets, step_size=settings.step_size, floor=settings.floor)

    def _next(self, observation: Observation) -> np.ndarray:
        assert observation.losses is not None
        return exponentiated_gradient(self.weights, observation.losses - self.targets, self.step_size, self.floor)

"""Dynamic batch loading of Sheared LLaMA: weights grow with the excess over a target loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewarm.mixing.mixers.base import Mixer, Observation, exponentiated_gradient


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

    def _next(self, observation: Observation) -> np.ndarray:
        assert observation.losses is not None
        return exponentiated_gradient(self.weights, observation.losses - self.targets, self.step_size, self.floor)

"""Static: the weights that the stage starts with."""

from __future__ import annotations

import numpy as np

from rewarm.config.registry import MIXERS
from rewarm.mixing.mixers.base import Mixer, Observation


@MIXERS.register("static")
class StaticMixer(Mixer):
    """The given weights, throughout. Cost per update: nothing."""

    name = "static"
    takes_missing_losses = True

    def _next(self, observation: Observation) -> np.ndarray:
        return self.weights

"""Online data mixing: an exponential-weight bandit over domains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field

from rewarm.config.registry import MIXERS
from rewarm.config.section import Duration, Section
from rewarm.mixing.mixers.base import Mixer, MixerContext, Observation, softmax


class ODMConfig(Section):
    """Online data mixing: a bandit whose reward is the training loss (Albalak et al. 2023)."""

    decay: float = Field(0.9, ge=0, lt=1)
    """Share of the old reward that each update keeps; second-hand default, scripts with 0.5 exist."""
    warmup: Duration = "0 steps"
    """Weights stay until then. The published runs wait 2000 steps (second-hand)."""


@MIXERS.register("odm", settings=ODMConfig)
class ODMMixer(Mixer):
    """Albalak et al., "Efficient Online Data Mixing For Language Model Pre-Training", 2023.

    Reward estimate ``R <- decay * R + (1 - decay) * loss / w`` for each domain that was trained on; exploration
    ``e_t = min(1/K, sqrt(ln K / (K t)))``; ``w = (1 - K e_t) * softmax(e_{t-1} * R) + e_t``, with t in steps. This is
    the paper's rule; the class that its published code names as the paper's differs (an average of ``exp(loss)``
    without the division by w).

    Cost per update: nothing, the training losses are there. State: weights, rewards, last exploration rate.

    Args:
        names: K domains.
        weights: float64 [K].
        decay: share of the old reward that is kept; second-hand default.
        warmup: steps during which rewards are gathered and weights stay.
    """

    name = "odm"
    needs = ("training_losses",)
    takes_missing_losses = True

    def __init__(self, names: Sequence[str], weights: np.ndarray, *, decay: float = 0.9, warmup: int = 0) -> None:
        super().__init__(names, weights)
        self.decay, self.warmup = decay, warmup
        self.rewards = np.zeros(len(self.names))
        self.exploration = 1 / len(self.names)

    @classmethod
    def build(cls, context: MixerContext, settings: ODMConfig) -> Self:
        """With the warm-up in steps."""
        return cls(context.names, context.weights, decay=settings.decay, warmup=context.steps(settings.warmup))

    def _next(self, observation: Observation) -> np.ndarray:
        losses = observation.training_losses
        assert losses is not None
        count = len(self.names)
        with np.errstate(divide="ignore", invalid="ignore"):
            reward = losses / self.weights
        fresh = self.decay * self.rewards + (1 - self.decay) * reward
        self.rewards = np.where(np.isfinite(reward), fresh, self.rewards)
        if observation.step < self.warmup or count == 1:
            return self.weights
        before = self.exploration
        self.exploration = min(1 / count, math.sqrt(math.log(count) / (count * max(1, observation.step))))
        return (1 - count * self.exploration) * softmax(before * self.rewards) + self.exploration

    def details(self) -> dict[str, dict[str, float]]:
        """The reward estimates."""
        return {"reward": self._by_name(self.rewards)}

    def state_dict(self) -> dict[str, Any]:
        """Weights, rewards and exploration rate."""
        return super().state_dict() | {"rewards": self.rewards.tolist(), "exploration": self.exploration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.rewards = np.array(state["rewards"], dtype=np.float64)
        self.exploration = float(state["exploration"])

"""Velocitune: weights grow where learning lags behind its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field

from rewarm.config.registry import MIXERS
from rewarm.mixing.mixers.base import Mixer, MixerContext, Observation, exponentiated_gradient
from rewarm.mixing.mixers.target_settings import TargetSettings


class VelocituneConfig(TargetSettings):
    """Weights grow where learning lags behind its target (Luo et al. 2024)."""

    step_size: float = Field(1.0, gt=0)
    """Factor of the velocities before the exponential; 1 is the paper's rule. The log-ratio of two weights grows by at
    most this per update, so many updates need a smaller one: keep step_size * updates near 10."""
    floor: float = Field(0.0, ge=0, lt=1)
    """Share of the batch that is spread equally whatever the velocities; 0 is the paper's rule."""
    learned_margin: float = Field(0.0, ge=0)
    """A domain whose initial loss is at most this far above its target, in nats, counts as learned: velocity 0."""


@MIXERS.register("velocitune", settings=VelocituneConfig)
class VelocituneMixer(Mixer):
    """Luo et al., "Velocitune: A Velocity-based Dynamic Domain Reweighting Method for Continual Pre-training", 2024.

    With initial losses l0 and targets l*, the velocity ``V = clip((l - l*) / (l0 - l*), 0, 1)`` is 1 for no progress
    and 0 for a target met; then ``w <- w * exp(step_size * V)``, normalised. The paper's rule is ``step_size=1``
    without a floor. The first observation gives the initial losses unless they are given.

    A domain whose initial loss is not above its target by more than ``learned_margin`` has nothing left to learn: its
    velocity is 0, and the note says so.

    Cost per update: the held-out losses, which an evaluation measures anyway. State: weights, initial losses.

    Args:
        names: K domains.
        weights: float64 [K].
        targets: float64 [K], nats per token.
        initial: float64 [K], or None to take the first observation.
        step_size: factor of the velocities.
        floor: share spread equally.
        learned_margin: nats.
    """

    name = "velocitune"
    needs = ("losses",)

    def __init__(
        self,
        names: Sequence[str],
        weights: np.ndarray,
        targets: np.ndarray,
        initial: np.ndarray | None = None,
        *,
        step_size: float = 1.0,
        floor: float = 0.0,
        learned_margin: float = 0.0,
    ) -> None:
        super().__init__(names, weights)
        self.targets, self.initial = targets, initial
        self.step_size, self.floor, self.learned_margin = step_size, floor, learned_margin
        self.velocities = np.ones(len(self.names))

    @classmethod
    def build(cls, context: MixerContext, settings: VelocituneConfig) -> Self:
        """With the targets in the order of the domains."""
        return cls(
            context.names, context.weights, settings.by_domain(context.names, "mixture.velocitune.targets"),
            context.initial_losses,
            step_size=settings.step_size, floor=settings.floor, learned_margin=settings.learned_margin,
        )  # fmt: skip

    def _next(self, observation: Observation) -> np.ndarray:
        losses = observation.losses
        assert losses is not None
        if self.initial is None:
            self.initial = losses.copy()
            self.note = "initial losses taken"
            return self.weights
        distance = self.initial - self.targets
        learned = distance <= self.learned_margin
        progress = (losses - self.targets) / np.where(learned, 1.0, distance)
        self.velocities = np.where(learned, 0.0, np.clip(progress, 0.0, 1.0))
        if learned.any():
            names = [name for name, is_learned in zip(self.names, learned, strict=True) if is_learned]
            self.note = f"already at the target when the stage began: {', '.join(names)}"
        return exponentiated_gradient(self.weights, self.velocities, self.step_size, self.floor)

    def details(self) -> dict[str, dict[str, float]]:
        """The velocities of the last update."""
        return {"velocity": self._by_name(self.velocities)}

    def state_dict(self) -> dict[str, Any]:
        """Weights and initial losses."""
        return super().state_dict() | {"initial": None if self.initial is None else self.initial.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.initial = None if state["initial"] is None else np.array(state["initial"], dtype=np.float64)

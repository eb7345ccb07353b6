"""Skill-It: weights from recent losses through a graph of which domain helps which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewarm.errors import UserError
from rewarm.mixing.mixers.base import Mixer, Observation, softmax


class SkillItMixer(Mixer):
    """Chen et al., "Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models", 2023.

    ``w = softmax(step_size * A @ (sum of the last losses))``, from uniform weights each time, where ``A[a, b]`` says
    how much training on a helps b. On a graph that is nearly empty or nearly complete the method has little to go by.

    Cost per update: the held-out losses; the graph costs a training run per pair beforehand. State: the last losses.

    Args:
        names: K domains.
        weights: float64 [K], used until the first update.
        graph: float64 [K, K].
        step_size: factor before the exponential.
        memory: how many observations are summed; 3 in the published code.
    """

    name = "skill_it"
    needs = ("losses",)

    def __init__(
        self, names: Sequence[str], weights: np.ndarray, graph: np.ndarray, *, step_size: float = 0.5, memory: int = 3
    ) -> None:
        super().__init__(names, weights)
        if graph.shape != (len(self.names),) * 2 or not np.isfinite(graph).all() or not graph.any():
            raise UserError(
                "the graph of skill_it has no edge or a value that is not finite",
                fix="give graph[a][b] > 0 for at least one pair where training on a helps b",
            )
        self.graph, self.step_size, self.memory = graph, step_size, memory
        self.recent: list[list[float]] = []

    def _next(self, observation: Observation) -> np.ndarray:
        assert observation.losses is not None
        self.recent = [*self.recent, observation.losses.tolist()][-self.memory :]
        return softmax(self.step_size * (self.graph @ np.sum(self.recent, axis=0)))

    def state_dict(self) -> dict[str, Any]:
        """Weights and the last losses."""
        return super().state_dict() | {"recent": self.recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.recent = [list(map(float, losses)) for losses in state["recent"]]

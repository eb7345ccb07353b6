"""Skill-It: weights from recent losses through a graph of which domain helps which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field

from rewarm.config.registry import MIXERS
from rewarm.config.section import Section
from rewarm.errors import UserError
from rewarm.mixing.mixers.base import Mixer, MixerContext, Observation, softmax


class SkillItConfig(Section):
    """Weights from recent losses through a graph of which domain helps which (Chen et al. 2023)."""

    graph: dict[str, dict[str, float]]
    """``graph[a][b]``: how much training on a lowers the loss on b; pairs that are left out count 0."""
    step_size: float = Field(0.5, gt=0)
    """Factor before the exponential; second-hand default, the paper tunes it."""
    memory: int = Field(3, ge=1)
    """Evaluations whose losses are summed."""


@MIXERS.register("skill_it", settings=SkillItConfig)
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

    @classmethod
    def build(cls, context: MixerContext, settings: SkillItConfig) -> Self:
        """With the graph as a matrix."""
        graph = graph_matrix(settings.graph, context.names)
        return cls(context.names, context.weights, graph, step_size=settings.step_size, memory=settings.memory)

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


def graph_matrix(graph: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> np.ndarray:
    """A skills graph as float64 [K, K]; pairs that are left out are 0.

    Raises:
        UserError: if it names a domain that does not exist.
    """
    rows = {name: dict(graph.get(name, {})) for name in names}
    unknown = sorted((set(graph) | {to for row in graph.values() for to in row}) - set(names))
    if unknown:
        raise UserError(
            f"the graph of skill_it names {unknown[0]!r}, which is not one of {', '.join(names)}",
            fix="use the names of the new domains",
        )
    return np.array([[float(rows[a].get(b, 0.0)) for b in names] for a in names])

"""Adaptive data optimisation: weights from the learning speed that each domain's own scaling law predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field

from rewarm.config.registry import MIXERS
from rewarm.config.section import Duration, Section
from rewarm.mixing.mixers.base import Mixer, MixerContext, Observation
from rewarm.mixing.power_law import fit_power_law

_LEAST_POINTS = 4
_LEAST_EXPONENT = 0.05


class ADOConfig(Section):
    """Adaptive data optimisation: weights from a scaling law of each domain, refitted as it trains (Jiang et al. 2024).

    Defaults are those of the published code.
    """

    warmup: Duration = "1000 steps"
    """Weights stay natural until then; the losses before it are left out of the fits."""
    smoothing: float = Field(0.1, gt=0, le=1)
    """Weight of the newest preference against the average of all before it."""
    credit_decay: float = Field(0.9, ge=0, lt=1)
    """How slowly the credit for data seen recently follows the weights."""
    credit_power: float = Field(0.5, ge=0)
    """Exponent of that credit."""
    floor: float = Field(0.01, ge=0, lt=1)
    """Smallest share of a domain."""


@MIXERS.register("ado", settings=ADOConfig)
class ADOMixer(Mixer):
    """Jiang et al., "Adaptive Data Optimization: Dynamic Sample Selection with Scaling Laws", 2024.

    Each domain's training losses after the warm-up are fitted by ``limit + scale * n ** -exponent``, n being the tokens
    of all domains. The preference is ``natural * credit ** credit_power * max(exponent, 0.05) * (loss - limit) / n``,
    normalised; the weights are ``(1 - smoothing) * average + smoothing * preference`` with a floor, the average being
    that of all preferences; the credit follows the weights. Laws are refitted at every update and there is no smoothing
    of the losses beyond their mean between updates, where the published code fits every 1000 steps to filtered losses.

    Cost per update: K fits of three numbers. State: weights, average, credit, count, and every loss since the warm-up.

    Args:
        names: K domains.
        weights: float64 [K], the natural weights.
        warmup: steps before the losses count.
        smoothing: weight of the newest preference.
        credit_decay: how much of the credit each update keeps.
        credit_power: exponent of the credit.
        floor: smallest share.
    """

    name = "ado"
    needs = ("training_losses", "training_counts")

    def __init__(
        self,
        names: Sequence[str],
        weights: np.ndarray,
        *,
        warmup: int = 1000,
        smoothing: float = 0.1,
        credit_decay: float = 0.9,
        credit_power: float = 0.5,
        floor: float = 0.01,
    ) -> None:
        super().__init__(names, weights)
        self.warmup, self.smoothing, self.floor = warmup, smoothing, floor
        self.credit_decay, self.credit_power = credit_decay, credit_power
        self.natural = self.weights.copy()
        self.average, self.credit = self.weights.copy(), self.weights.copy()
        self.count, self.tokens = 0, 0
        self.history: list[list[list[float]]] = [[] for _ in self.names]
        """For each domain its (tokens of all domains, loss) pairs."""

    @classmethod
    def start(
        cls, settings: Any, given: Mapping[str, float] | None, tokens: Mapping[str, int], budget: float | None
    ) -> dict[str, float]:
        """Those given, else natural ones: in proportion to the domains' tokens."""
        return super().start(settings, given or {name: float(size) for name, size in tokens.items()}, tokens, budget)

    @classmethod
    def build(cls, context: MixerContext, settings: ADOConfig) -> Self:
        """With the warm-up in steps."""
        return cls(
            context.names, context.weights,
            warmup=context.steps(settings.warmup), smoothing=settings.smoothing, credit_decay=settings.credit_decay,
            credit_power=settings.credit_power, floor=settings.floor,
        )  # fmt: skip

    def _next(self, observation: Observation) -> np.ndarray:
        losses, counts = observation.training_losses, observation.training_counts
        assert losses is not None and counts is not None
        self.tokens += int(counts.sum())
        if observation.step <= self.warmup:
            return self.weights
        for points, loss in zip(self.history, losses.tolist(), strict=True):
            if np.isfinite(loss):
                points.append([float(self.tokens), loss])
        share = counts / max(1, int(counts.sum()))
        self.credit = self.credit_decay * self.credit + (1 - self.credit_decay) * share
        if min(map(len, self.history)) < _LEAST_POINTS:
            self.note = "too few losses for a scaling law"
            return self.weights
        preference = self.natural * self.credit**self.credit_power * self._speeds()
        preference = preference / preference.sum()
        weights = (1 - self.smoothing) * self.average + self.smoothing * preference
        self.count += 1
        self.average = self.average + (preference - self.average) / (self.count + 1)
        return _floored(weights / weights.sum(), self.floor)

    def _speeds(self) -> np.ndarray:
        """Predicted fall of each domain's loss per token, float64 [K]."""
        speeds = np.empty(len(self.names))
        for index, points in enumerate(self.history):
            amounts, losses = np.array(points).T
            law = fit_power_law(amounts, losses)
            reducible = max(law.scale * self.tokens**-law.exponent, 1e-6)
            speeds[index] = max(law.exponent, _LEAST_EXPONENT) * reducible / self.tokens
        return speeds

    def state_dict(self) -> dict[str, Any]:
        """Weights, average, credit, counts and the loss history."""
        return super().state_dict() | {
            "natural": self.natural.tolist(),
            "average": self.average.tolist(),
            "credit": self.credit.tolist(),
            "count": self.count,
            "tokens": self.tokens,
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.natural = np.array(state["natural"], dtype=np.float64)
        self.average = np.array(state["average"], dtype=np.float64)
        self.credit = np.array(state["credit"], dtype=np.float64)
        self.count, self.tokens = int(state["count"]), int(state["tokens"])
        self.history = [[list(map(float, point)) for point in points] for points in state["history"]]


def _floored(weights: np.ndarray, floor: float) -> np.ndarray:
    """Raise small shares to the floor, at the cost of the others in proportion."""
    low = np.zeros(len(weights), dtype=bool)
    result = weights
    while (fresh := (result < floor) & ~low).any() and floor * len(weights) < 1:
        low |= fresh
        result = np.where(low, floor, weights * (1 - floor * low.sum()) / weights[~low].sum())
    return result

"""DoReMi: group distributionally robust weights of a proxy against a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field

from rewarm.config.paths import PathText
from rewarm.config.registry import MIXERS
from rewarm.config.section import Section
from rewarm.mixing.mixers.base import Mixer, MixerContext, Observation, by_domain, exponentiated_gradient


class DoReMiConfig(Section):
    """Weights of the loss, not of the samples, that grow where the model is worse than a reference (Xie et al. 2023).

    The samples keep ``mixture.weights``, equal if not given, which is also what the weights of the loss start from.
    The method's result is their mean: ``rewarm mixture average RUN``.
    """

    reference: dict[str, float] | PathText
    """Held-out loss of a reference model on each new domain, in nats per token; or a run or checkpoint that evaluated
    the same held-out windows; or the output of ``rewarm evaluate --json``."""
    step_size: float = Field(1.0, gt=0)
    """Factor of the excess losses, which are clipped at 0; 1 in the paper."""
    floor: float = Field(1e-3, ge=0, lt=1)
    """Share of the loss that is spread equally; the paper's smoothing."""


@MIXERS.register("doremi", settings=DoReMiConfig)
class DoReMiMixer(Mixer):
    """Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", 2023.

    ``w <- w * exp(step_size * max(l - l_reference, 0))``, normalised, then a floor; the result is the *mean* of the
    weights over all updates. They weight the loss: in a run the samples keep their shares. In the paper the maximum is
    taken per token of the proxy's training batch, at every step; here it is taken of the losses observed, at every
    evaluation. A domain that was not observed (NaN) keeps its last excess.

    Cost per update: the losses of proxy and reference. State: weights, their sum, count, last excess, reference.

    Args:
        names: K domains.
        weights: float64 [K].
        reference: float64 [K], losses of the reference model.
        step_size: factor of the excess; 1 in the published code.
        floor: share spread equally; 1e-3 in the published code.
    """

    name = "doremi"
    needs = ("losses",)
    steers_objective = True
    takes_missing_losses = True

    def __init__(
        self,
        names: Sequence[str],
        weights: np.ndarray,
        reference: np.ndarray,
        *,
        step_size: float = 1.0,
        floor: float = 1e-3,
    ) -> None:
        super().__init__(names, weights)
        self.reference, self.step_size, self.floor = reference, step_size, floor
        self._sum, self._count = np.zeros(len(self.names)), 0
        self._excess = np.zeros(len(self.names))

    @property
    def average(self) -> np.ndarray:
        """float64 [K]; mean of the weights so far, the method's result."""
        return self._sum / self._count if self._count else self.weights.copy()

    @classmethod
    def build(cls, context: MixerContext, settings: DoReMiConfig) -> Self:
        """With the reference's losses in the order of the domains."""
        given = settings.reference
        losses = context.reference(given) if isinstance(given, str) else given
        reference = by_domain(losses, context.names, "mixture.doremi.reference")
        return cls(context.names, context.weights, reference, step_size=settings.step_size, floor=settings.floor)

    def _next(self, observation: Observation) -> np.ndarray:
        assert observation.losses is not None
        excess = np.maximum(observation.losses - self.reference, 0.0)
        self._excess = np.where(np.isnan(excess), self._excess, excess)
        weights = exponentiated_gradient(self.weights, self._excess, self.step_size, self.floor)
        self._sum, self._count = self._sum + weights, self._count + 1
        return weights

    def details(self) -> dict[str, dict[str, float]]:
        """The mean of the weights."""
        return {"average": self._by_name(self.average)}

    def state_dict(self) -> dict[str, Any]:
        """Weights, their sum and count, the last excess, and the losses of the reference."""
        own = {
            "sum": self._sum.tolist(),
            "count": self._count,
            "excess": self._excess.tolist(),
            "reference": self.reference.tolist(),
        }
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self._sum, self._count = np.array(state["sum"], dtype=np.float64), int(state["count"])
        self._excess = np.array(state["excess"], dtype=np.float64)
        # Whatever became of the reference's files since: the run goes on against what it began with.
        self.reference = np.array(state["reference"], dtype=np.float64)

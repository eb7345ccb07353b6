"""The interface of a mixer, and the update that most of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field

from rewarm.config.section import Section
from rewarm.errors import UserError, nearest
from rewarm.mixing.clock import Clock


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known at one update. K domains, in the mixer's order; what was not measured is None."""

    step: int
    """Steps trained so far."""
    losses: np.ndarray | None = None
    """float64 [K]; held-out loss in nats per token."""
    training_losses: np.ndarray | None = None
    """float64 [K]; mean training loss in nats per token since the last update, NaN for a domain that was not drawn."""
    training_counts: np.ndarray | None = None
    """int64 [K]; target tokens trained on since the last update."""
    squared_gradient_norms: np.ndarray | None = None
    """float64 [K]; squared norm of the gradient of each domain's mean loss, estimated without bias: noise can take it
    below 0."""
    gradient_variances: np.ndarray | None = None
    """float64 [K]; trace of the covariance of each domain's per-sample gradients."""
    gradient_products: np.ndarray | None = None
    """float64 [K, K]; inner products of the domains' gradients."""
    probe_mixes: np.ndarray | None = None
    """float64 [P, K]; mixtures that short probes trained on, each row summing to 1."""
    probe_drops: np.ndarray | None = None
    """float64 [P, K]; how much each probe lowered each domain's held-out loss, in nats."""


def _no_reference(place: str) -> Mapping[str, float]:
    raise UserError(f"{place} cannot be read here", fix="give the losses by domain")


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """A change of the new domains' weights that is known before the stage begins."""

    step: int
    """The step from which it holds."""
    shares: Mapping[str, float]
    """Weight of each new domain, any scale."""
    reason: str
    """For the weight log."""


class GradientSettings(Section):
    """What the mixers that compare gradients have in common."""

    windows_per_domain: int | None = Field(None, ge=2)
    """Held-out windows of each new domain whose gradients an update compares, others at every update in turn. An update
    costs a forward and a backward pass over them; the noise of what it measures falls with the square root of their
    number. Null means an eighth of evaluation.windows_per_domain, so that an update costs no more than the evaluation
    before it. All of them when the split has fewer."""


@dataclass(frozen=True, slots=True)
class MixerContext:
    """What a mixer is built from besides its settings."""

    names: Sequence[str]
    """The new domains."""
    weights: np.ndarray
    """float64 [K], the fractions that the stage starts with."""
    steps: Callable[[str], int]
    """A duration in whole steps of the stage."""
    reference: Callable[[str], Mapping[str, float]] = _no_reference
    """Held-out losses by domain that a path of a run or a file names."""
    batch_size: int = 64
    """Samples of a step."""
    initial_losses: np.ndarray | None = None
    """float64 [K], losses before training where they are known beforehand; None in a run."""


class Mixer(ABC):
    """Decides the weights of the new domains.

    A mixer computes in float64 from fractions of a weight vector; what takes effect is its quantised weights, which
    :meth:`adopt` gives back to it, so that the weight log alone restores them.

    Args:
        names: the domains.
        weights: float64 [K], the fractions that the stage starts with.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`Observation` that an update reads; empty for a mixer that is never updated."""
    steers_objective: ClassVar[bool] = False
    """True if its weights are shares of the loss, while the samples keep theirs."""
    takes_weights: ClassVar[bool] = True
    """False if it computes the weights that the stage starts with from the domains' sizes."""
    takes_missing_losses: ClassVar[bool] = False
    """True if an update can do with a domain whose loss was not measured (NaN)."""

    def __init__(self, names: Sequence[str], weights: np.ndarray) -> None:
        self.names = list(names)
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.note = ""
        """What was special about the last update; it goes into the weight log."""

    @classmethod
    def build(cls, context: MixerContext, settings: Any) -> Self:
        """The mixer of a run. As it stands, each setting becomes the constructor's argument of the same name.

        Args:
            context: of the stage.
            settings: the mixer's own section; None if it has none.
        """
        values = {} if settings is None else {name: getattr(settings, name) for name in type(settings).model_fields}
        return cls(context.names, context.weights, **values)

    @classmethod
    def build_for_table(cls, context: MixerContext, settings: Any) -> Mixer:
        """The mixer that ``rewarm mixture simulate`` feeds with a table of losses; usually that of a run."""
        return cls.build(context, settings)

    @classmethod
    def start(
        cls, settings: Any, given: Mapping[str, float] | None, tokens: Mapping[str, int], budget: float | None
    ) -> dict[str, float]:
        """Weights of the new domains at the first sample, any scale. As it stands, those given, else equal ones.

        Args:
            settings: the mixer's own section.
            given: ``mixture.weights``.
            tokens: training tokens of each new domain, in the configuration's order.
            budget: target tokens that the stage trains on new domains; None where it is not known.
        """
        weights = given or dict.fromkeys(tokens, 1.0)
        return {name: weights[name] for name in tokens}

    @classmethod
    def planned(cls, settings: Any, tokens: Mapping[str, int], clock: Clock) -> list[PlannedChange]:
        """The changes of weights that do not depend on any loss. As it stands, none.

        Raises:
            UserError: if one lies outside the stage.
        """
        return []

    @classmethod
    def is_updated(cls, settings: Any) -> bool:
        """True if evaluations can change the weights."""
        return bool(cls.needs)

    @classmethod
    def compares_gradients(cls) -> bool:
        """True if an update reads gradients of the domains."""
        return any("gradient" in field for field in cls.needs)

    @property
    def needs_gradients(self) -> bool:
        """True if an update reads gradients of the domains."""
        return self.compares_gradients()

    def update(self, observation: Observation) -> np.ndarray:
        """Next weights.

        Returns:
            float64 [K] summing to 1.
        """
        self.note = ""
        for field in self.needs:
            assert getattr(observation, field) is not None, f"{self.name} needs {field}"
        self.weights = self._next(observation)
        return self.weights.copy()

    @abstractmethod
    def _next(self, observation: Observation) -> np.ndarray:
        """The rule."""

    def adopt(self, weights: np.ndarray) -> None:
        """Take the fractions that will really be used, float64 [K], as the current weights."""
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)

    def details(self) -> dict[str, dict[str, float]]:
        """Quantities of the last update worth showing, by name and domain."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later updates, as plain JSON values."""
        return {"names": self.names, "weights": self.weights.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises:
            UserError: if it is of other domains.
        """
        if list(state["names"]) != self.names:
            raise UserError(
                f"the state of mixer {self.name} is of the domains {state['names']}, the stage has {self.names}",
                fix="resume with the domains of the checkpoint, or start a new stage",
            )
        self.weights = np.array(state["weights"], dtype=np.float64)

    def _by_name(self, values: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(self.names, values, strict=True)}


def exponentiated_gradient(weights: np.ndarray, scores: np.ndarray, step_size: float, floor: float) -> np.ndarray:
    """``(1 - floor) * softmax(log(weights) + step_size * scores) + floor / K``.

    A weight of 0 stays 0 apart from the floor. Equal scores leave the weights as they are when the floor is 0.

    Args:
        weights: [K], not negative, not all 0.
        scores: [K], finite.
        step_size: factor of the scores.
        floor: share that is spread equally.

    Returns:
        float64 [K] summing to 1.
    """
    with np.errstate(divide="ignore"):
        logits = np.log(weights) + step_size * scores
    return (1 - floor) * softmax(logits) + floor / len(weights)


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [K] summing to 1; safe for large values and for minus infinity."""
    powers = np.exp(logits - np.max(logits))
    return powers / powers.sum()


def by_domain(values: Mapping[str, float], names: Sequence[str], what: str) -> np.ndarray:
    """Named values in the order of the domains, float64 [K].

    Raises:
        UserError: if a domain has none, a name is no domain, or a value is not finite.
    """
    for name in values:
        if name not in names:
            guess = nearest(name, list(names))
            raise UserError(
                f"{what} names {name!r}, which is not one of the domains {', '.join(names)}",
                fix=f"did you mean {guess!r}?" if guess else "use the names of the new domains",
            )
    for name in names:
        if name not in values:
            raise UserError(f"{what} has no value for domain {name!r}", fix="give one for every new domain")
        if not np.isfinite(values[name]):
            raise UserError(f"{what} of domain {name!r} is {values[name]}", fix="give a finite number")
    return np.array([values[name] for name in names], dtype=np.float64)

"""Phased: one blend after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from rewarm.config.registry import MIXERS
from rewarm.config.section import Duration, Section, check_shares
from rewarm.mixing.clock import Clock, falls_to, inside
from rewarm.mixing.mixers.base import MixerContext, PlannedChange
from rewarm.mixing.mixers.static import StaticMixer


class PhaseConfig(Section):
    """Weights that hold from a trigger on, until another phase begins. Exactly one trigger."""

    weights: dict[str, float]
    """Weight of every new domain, any positive scale."""
    at: Duration | None = None
    """Where in the stage it begins: steps, tokens or a percentage."""
    learning_rate_fraction: float | None = Field(None, gt=0, lt=1)
    """It begins when the learning rate has fallen to this fraction of the schedule's peak. 0.2 is the switch of
    Parmar et al. 2024, "Reuse, Don't Retrain"."""
    loss_below: dict[str, float] | None = None
    """It begins at the first evaluation where every domain named here has a held-out loss below its value, in nats
    per token."""

    @model_validator(mode="after")
    def _check(self) -> PhaseConfig:
        triggers = {"at", "learning_rate_fraction", "loss_below"}
        given = sorted(name for name in triggers if getattr(self, name) is not None)
        if len(given) != 1:
            raise ValueError(f"a phase needs exactly one of {sorted(triggers)}; given: {given or 'none'}")
        check_shares(self.weights, "a phase's weights")
        return self


class PhasedConfig(Section):
    """Blends one after the other; the first is ``mixture.weights``."""

    phases: list[PhaseConfig] = Field(min_length=1)
    """The blends that follow."""


@MIXERS.register("phased", settings=PhasedConfig)
class PhasedMixer(StaticMixer):
    """Blends one after the other: at planned points, or when losses are reached. The controller watches the losses, of
    replayed domains too, and begins such a phase."""

    name = "phased"

    @classmethod
    def build(cls, context: MixerContext, settings: PhasedConfig) -> Self:
        """At the first blend."""
        return cls(context.names, context.weights)

    @classmethod
    def is_updated(cls, settings: PhasedConfig) -> bool:
        """True if a phase waits for losses."""
        return any(phase.loss_below is not None for phase in settings.phases)

    @classmethod
    def planned(cls, settings: PhasedConfig, tokens: Mapping[str, int], clock: Clock) -> list[PlannedChange]:
        """The phases that wait for no loss."""
        return [
            PlannedChange(_begin(phase, number, clock), phase.weights, f"phase {number}")
            for number, phase in enumerate(settings.phases)
            if phase.loss_below is None
        ]


def _begin(phase: PhaseConfig, number: int, clock: Clock) -> int:
    where = f"mixture.phased.phases[{number}]"
    if phase.at is not None:
        return inside(clock.steps(phase.at), clock, f"{where}.at={phase.at}")
    assert phase.learning_rate_fraction is not None
    return falls_to(phase.learning_rate_fraction, clock, where)

"""Temperature: between proportional and equal weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from rewarm.config.registry import MIXERS
from rewarm.config.section import Duration, Section
from rewarm.mixing.clock import Clock, inside
from rewarm.mixing.mixers.base import MixerContext, PlannedChange
from rewarm.mixing.mixers.static import StaticMixer


class TemperatureConfig(Section):
    """Weights in proportion to ``tokens ** (1 / temperature)``."""

    temperature: float = Field(5.0, ge=1)
    """1 is proportional to tokens; the higher, the closer to equal weights. 5 is common, not measured here."""
    cooldown_at: Duration | None = None
    """Where in the stage the temperature changes to ``cooldown_temperature``; null means never."""
    cooldown_temperature: float = Field(1.0, ge=1)
    """Temperature after ``cooldown_at`` (Li et al. 2024 end at 1)."""

    @model_validator(mode="after")
    def _check_ignored(self) -> TemperatureConfig:
        if self.cooldown_at is None and self.cooldown_temperature != 1.0:
            raise ValueError("cooldown_temperature is ignored without cooldown_at: set where the cooldown begins")
        return self


@MIXERS.register("temperature", settings=TemperatureConfig)
class TemperatureMixer(StaticMixer):
    """Conneau et al., "Unsupervised Cross-lingual Representation Learning at Scale", 2019; the change of temperature
    within a stage is that of Li et al., "Upsample or Upweight?", 2024. Cost per update: nothing."""

    name = "temperature"
    takes_weights = False

    @classmethod
    def build(cls, context: MixerContext, settings: TemperatureConfig) -> Self:
        """The settings have done their work in the weights it starts with."""
        return cls(context.names, context.weights)

    @classmethod
    def start(
        cls,
        settings: TemperatureConfig,
        given: Mapping[str, float] | None,
        tokens: Mapping[str, int],
        budget: float | None,
    ) -> dict[str, float]:
        """By the tokens, at the temperature that the stage starts with."""
        return _by_name(tokens, settings.temperature)

    @classmethod
    def planned(cls, settings: TemperatureConfig, tokens: Mapping[str, int], clock: Clock) -> list[PlannedChange]:
        """The change of temperature, if there is one."""
        if settings.cooldown_at is None:
            return []
        where = f"mixture.temperature.cooldown_at={settings.cooldown_at}"
        step = inside(clock.steps(settings.cooldown_at), clock, where)
        reason = f"temperature {settings.cooldown_temperature}"
        return [PlannedChange(step, _by_name(tokens, settings.cooldown_temperature), reason)]


def _by_name(tokens: Mapping[str, int], temperature: float) -> dict[str, float]:
    weights = temperature_weights(np.array(list(tokens.values()), dtype=np.float64), temperature)
    return dict(zip(tokens, weights.tolist(), strict=True))


def temperature_weights(tokens: np.ndarray, temperature: float) -> np.ndarray:
    """``tokens ** (1 / temperature)``, normalised: 1 is proportional, infinity equal (Conneau et al. 2019).

    Args:
        tokens: [K], positive.
        temperature: at least 1.

    Returns:
        float64 [K] summing to 1.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    powers = (tokens / tokens.max()) ** (1 / temperature)
    return powers / powers.sum()

"""Proportional: weights by the domains' sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewarm.config.registry import MIXERS
from rewarm.mixing.mixers.static import StaticMixer


@MIXERS.register("proportional")
class ProportionalMixer(StaticMixer):
    """By each domain's tokens, throughout."""

    name = "proportional"
    takes_weights = False

    @classmethod
    def start(
        cls, settings: Any, given: Mapping[str, float] | None, tokens: Mapping[str, int], budget: float | None
    ) -> dict[str, float]:
        """The tokens themselves."""
        return {name: float(size) for name, size in tokens.items()}

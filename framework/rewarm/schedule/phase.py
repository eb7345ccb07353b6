"""A stretch of a stage in which the learning rate follows one shape."""

from __future__ import annotations

from dataclasses import dataclass

from rewarm.config.registry import SHAPES
from rewarm.config.section import resolve_duration
from rewarm.schedule import curves


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the run in which the rate follows one shape."""

    shape: str
    """``"warmup"``, ``"constant"`` or a registered decay shape."""
    begin: int
    """Tokens trained when the phase begins."""
    end: int
    """Tokens trained when it ends, above ``begin``."""
    first: float
    """Rate at ``begin``."""
    last: float
    """Rate at ``end``."""

    def at(self, tokens: float) -> float:
        """Rate after ``tokens`` tokens, within [begin, end]."""
        x = (tokens - self.begin) / (self.end - self.begin)
        if self.shape == "constant":
            return self.first
        if self.shape == "warmup":
            return curves.between(x, self.last, self.first)
        rate: float = SHAPES[self.shape].target(x, self.first, self.last)
        return rate


@dataclass(frozen=True, slots=True)
class Span:
    """The length of a stage."""

    total_tokens: int
    """Target tokens of the whole stage."""
    tokens_per_step: int
    """Target tokens of one step."""

    def tokens(self, duration: str) -> int:
        """A duration in tokens, in whole steps."""
        return resolve_duration(duration, tokens_per_step=self.tokens_per_step, total_tokens=self.total_tokens)

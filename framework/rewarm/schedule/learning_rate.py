"""The learning rate of a stage.

Convention. A step trains on ``tokens_per_step`` tokens; ``at(tokens)`` is the rate of the step that starts after
``tokens`` tokens. The warm-up is read at the *end* of the step, so that the first step already moves the weights and
the last step of a warm-up of W steps is exactly at the peak: step k has ``start + (peak - start) * (k + 1) / W``.
Every later phase is read at the *start* of the step, so that a fall to zero wastes no step either: the first step
of a fall of D steps is at its upper end, the last one at progress ``1 - 1/D``, and ``at(total_tokens)``, the rate
that a next stage would continue from, is exactly the lower end.

Nothing else is state: a resume needs the configuration and the token count.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from rewarm.config.section import resolve_duration
from rewarm.config.training import ScheduleConfig
from rewarm.errors import UserError
from rewarm.schedule import curves

Shape = Literal["warmup", "constant", "linear", "one_minus_sqrt", "cosine", "exponential"]

_FALLS = {"linear": curves.linear, "one_minus_sqrt": curves.one_minus_sqrt, "cosine": curves.cosine}


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the run in which the rate follows one shape."""

    shape: Shape
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
        if self.shape == "exponential":
            return curves.exponential(x, self.first, self.last)
        return curves.between(_FALLS[self.shape](x), self.first, self.last)


class LearningRate:
    """The rate of every step of a stage, a pure function of the tokens trained before it.

    Args:
        config: the schedule.
        total_tokens: target tokens of the whole stage.
        tokens_per_step: target tokens of one step.

    Raises:
        UserError: if the phases need more tokens than the stage has, naming them.
    """

    def __init__(self, config: ScheduleConfig, total_tokens: int, tokens_per_step: int) -> None:
        assert 0 < tokens_per_step <= total_tokens, (tokens_per_step, total_tokens)
        if config.start == "parent":
            raise UserError(
                "schedule.start=parent is not resolved here: the parent's lineage says which rate it is",
                fix="write the rate itself",
            )
        self._tokens_per_step = tokens_per_step
        self._total_tokens = total_tokens
        self.phases: tuple[Phase, ...] = _phases(config, total_tokens, tokens_per_step)

    def at(self, tokens: int) -> float:
        """Rate of the step that starts after ``tokens`` tokens; past the end it stays at the final rate."""
        assert tokens >= 0, tokens
        for phase in self.phases:
            if tokens < phase.end:
                if phase.shape == "warmup":
                    return phase.at(min(tokens + self._tokens_per_step, phase.end))
                return phase.at(tokens)
        return self.phases[-1].last

    def describe(self) -> str:
        """One line for people: ``warm-up 0 to 0.0003 over 10 steps, cosine to 3e-05 over 990 steps``."""
        parts = []
        for phase in self.phases:
            num_steps = (phase.end - phase.begin) / self._tokens_per_step
            over = f"over {num_steps:,.10g} step" + ("" if num_steps == 1 else "s")
            if phase.shape == "warmup":
                parts.append(f"warm-up {phase.first:.4g} to {phase.last:.4g} {over}")
            elif phase.shape == "constant":
                parts.append(f"constant {phase.first:.4g} {over}")
            else:
                start = "" if parts else f" {phase.first:.4g}"
                parts.append(f"{phase.shape.replace('_', ' ')}{start} to {phase.last:.4g} {over}")
        return ", ".join(parts)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of what decides the rate of every step; equal exactly when the schedules are."""
        phases = [[p.shape, p.begin, p.end, p.first.hex(), p.last.hex()] for p in self.phases]
        text = json.dumps({"version": 1, "tokens_per_step": self._tokens_per_step, "phases": phases})
        return hashlib.sha256(text.encode()).hexdigest()


def _phases(config: ScheduleConfig, total_tokens: int, tokens_per_step: int) -> tuple[Phase, ...]:
    """The phases that are not empty, in order; they cover [0, total_tokens] without a gap."""

    def tokens(duration: str) -> int:
        return resolve_duration(duration, tokens_per_step=tokens_per_step, total_tokens=total_tokens)

    lengths = {"warmup": tokens(config.warmup)}
    if config.kind == "infinite":
        lengths["cooldown"] = tokens(config.cooldown)
    if config.kind in ("wsd", "infinite"):
        lengths["decay"] = tokens(config.decay)
    _check_fit(config, lengths, total_tokens, tokens_per_step)

    warm, anneal = lengths["warmup"], total_tokens - lengths.get("decay", 0)
    phases = [Phase("warmup", 0, warm, float(config.start), config.peak)]
    if config.kind == "constant":
        phases.append(Phase("constant", warm, total_tokens, config.peak, config.peak))
    elif config.kind in ("cosine", "linear"):
        phases.append(Phase(config.kind, warm, total_tokens, config.peak, config.minimum))
    elif config.kind == "wsd":
        phases.append(Phase("constant", warm, anneal, config.peak, config.peak))
        phases.append(Phase(config.decay_shape, anneal, total_tokens, config.peak, config.minimum))
    else:
        assert config.plateau is not None  # ScheduleConfig refuses infinite without it
        cool = warm + lengths["cooldown"]
        phases.append(Phase("cosine", warm, cool, config.peak, config.plateau))
        phases.append(Phase("constant", cool, anneal, config.plateau, config.plateau))
        phases.append(Phase(config.decay_shape, anneal, total_tokens, config.plateau, config.minimum))
    return tuple(phase for phase in phases if phase.begin < phase.end)


def _check_fit(config: ScheduleConfig, lengths: dict[str, int], total_tokens: int, tokens_per_step: int) -> None:
    if sum(lengths.values()) <= total_tokens:
        return
    parts = [
        f"schedule.{name}={getattr(config, name)} ({length / tokens_per_step:,.10g} steps)"
        for name, length in lengths.items()
        if length
    ]
    raise UserError(
        f"{' and '.join(parts)} need {sum(lengths.values()) / tokens_per_step:,.10g} steps, but the run has "
        f"{total_tokens / tokens_per_step:,.10g}",
        fix="shorten them, or lengthen duration; '0 steps' leaves a phase out",
    )

"""Shapes of a learning rate's fall, as pure functions of progress and of the rates at the two ends.

A shape is a function ``(x, first, last)``: the rate at progress x in [0, 1], ``first`` at x = 0 and ``last`` at x = 1.
Registered, it can be named by ``schedule.decay_shape`` and by the phases of every schedule.
"""

from __future__ import annotations

import math

from rewarm.config.registry import SHAPES


@SHAPES.register("linear")
def linear(x: float, first: float, last: float) -> float:
    """Share ``1 - x``: to zero, the schedule of Defazio et al. 2023 and Bergsma et al. 2025 ("D2Z")."""
    return between(1.0 - x, first, last)


@SHAPES.register("one_minus_sqrt")
def one_minus_sqrt(x: float, first: float, last: float) -> float:
    """Share ``1 - sqrt(x)``: the final decay that Hägele et al. 2024 found better than the linear one."""
    return between(1.0 - math.sqrt(x), first, last)


@SHAPES.register("cosine")
def cosine(x: float, first: float, last: float) -> float:
    """Share ``(1 + cos(pi x)) / 2`` (Loshchilov & Hutter 2017)."""
    return between(0.5 * (1.0 + math.cos(math.pi * x)), first, last)


@SHAPES.register("exponential")
def exponential(x: float, first: float, last: float) -> float:
    """``first * (last / first)^x``, which never reaches 0 (Ibrahim et al. 2024, Singh et al. 2025)."""
    return _clamp(first * (last / first) ** x, first, last)


def between(share: float, high: float, low: float) -> float:
    """``share * high + (1 - share) * low``; exactly ``high`` at share 1 and ``low`` at share 0, never outside."""
    return _clamp(share * high + (1.0 - share) * low, high, low)


def _clamp(value: float, one: float, other: float) -> float:
    """Rounding must not carry a rate past the end it was given."""
    return min(max(value, min(one, other)), max(one, other))

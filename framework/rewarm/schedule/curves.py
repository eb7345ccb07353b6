"""Shapes of a learning rate's rise and fall, as pure functions of progress.

Every fall maps progress x in [0, 1] to a share that goes from 1 at x = 0 to 0 at x = 1; :func:`between` turns the
share into a rate. The exponential has no share that reaches 0 and is a function of its two ends.
"""

from __future__ import annotations

import math


def linear(x: float) -> float:
    """``1 - x``; to zero it is the schedule of Defazio et al. 2023 and of Bergsma et al. 2025 ("D2Z")."""
    return 1.0 - x


def one_minus_sqrt(x: float) -> float:
    """``1 - sqrt(x)``: the final decay that Hägele et al. 2024 found better than the linear one."""
    return 1.0 - math.sqrt(x)


def cosine(x: float) -> float:
    """``(1 + cos(pi x)) / 2`` (Loshchilov & Hutter 2017)."""
    return 0.5 * (1.0 + math.cos(math.pi * x))


def exponential(x: float, high: float, low: float) -> float:
    """``high * (low / high)^x``, the anneal of the infinite schedule (Ibrahim et al. 2024, Singh et al. 2025).

    Args:
        x: progress in [0, 1].
        high: rate at x = 0, above 0.
        low: rate at x = 1, above 0.
    """
    return _clamp(high * (low / high) ** x, high, low)


def between(share: float, high: float, low: float) -> float:
    """``share * high + (1 - share) * low``; exactly ``high`` at share 1 and ``low`` at share 0, never outside."""
    return _clamp(share * high + (1.0 - share) * low, high, low)


def _clamp(value: float, one: float, other: float) -> float:
    """Rounding must not carry a rate past the end it was given."""
    return min(max(value, min(one, other)), max(one, other))

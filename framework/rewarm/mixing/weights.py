"""Domain weights as integers that sum to 2^32, so that every rank and every machine counts alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from rewarm.errors import UserError

TOTAL = 2**32
"""What the integer weights of a mixture sum to."""


def check_weights(weights: Sequence[float] | np.ndarray, names: Sequence[str] | None = None) -> None:
    """Refuse weights that are no mixture.

    Args:
        weights: [K], any scale.
        names: the domains' names for the message; indexes are used without them.

    Raises:
        UserError: if there are none, one is negative, NaN or infinite, or all are 0.
    """
    if len(weights) == 0:
        raise UserError("a mixture of no domains has no weights", fix="name at least one domain")
    for index, weight in enumerate(weights):
        if not 0 <= float(weight) < math.inf:
            who = f"domain {names[index]!r}" if names is not None else f"domain number {index}"
            raise UserError(f"the weight of {who} is {weight}", fix="give a finite weight that is not negative")
    if not any(float(weight) > 0 for weight in weights):
        raise UserError("the domain weights sum to 0", fix="give at least one domain a positive weight")


def quantise(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Round a mixture to integers that sum to 2^32 exactly, by largest remainder.

    The arithmetic is exact, so the result is the same on every machine; equal remainders go to the lower index.
    A positive weight that would round to 0 becomes 1, taken from the largest.

    Args:
        weights: [K], not negative, any scale.

    Returns:
        int64 [K].

    Raises:
        UserError: as :func:`check_weights`.
    """
    check_weights(weights)
    exact = [Fraction(weight) if isinstance(weight, int) else Fraction(float(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight * TOTAL / total for weight in exact]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: (counts[index] - shares[index], index))
    for index in by_remainder[: TOTAL - sum(counts)]:
        counts[index] += 1
    for index, weight in enumerate(exact):
        if weight > 0 and counts[index] == 0:
            counts[index] = 1
            counts[max(range(len(counts)), key=lambda other: (counts[other], -other))] -= 1
    return np.array(counts, dtype=np.int64)


def fractions(weights: np.ndarray) -> np.ndarray:
    """Integer weights as float64 [K] summing to 1; exact, because 32 bits fit in the mantissa."""
    return np.asarray(weights, dtype=np.float64) / TOTAL


def align(weights: Mapping[str, int], names: Sequence[str]) -> np.ndarray:
    """Named integer weights in the order of ``names``, int64 [K]; both must hold the same domains.

    Raises:
        UserError: naming the domains that only one of the two holds.
    """
    if set(weights) != set(names):
        only = sorted(set(weights) - set(names)), sorted(set(names) - set(weights))
        raise UserError(
            f"weights and domains differ: only in the weights {only[0]}, only in the domains {only[1]}",
            fix="give one weight for each domain; 0 switches a domain off",
        )
    return np.array([weights[name] for name in names], dtype=np.int64)

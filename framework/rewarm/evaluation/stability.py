"""The stability gap: how an old domain's loss rises after a switch of data, and how far it comes back.

De Lange et al. 2023 ("Continual evaluation for lifelong learning") named the gap and measured it in accuracy;
Caccia et al. 2022 and Guo et al. 2024 saw it in representations and in language models. These are the same
quantities for a loss L(t) in nats per token over trained tokens t, from the evaluation lines of one run whose
first line, at t0, is before the switch:

- peak rise: ``max_t L(t) - L(t0)``
- area: the integral over tokens of ``max(0, L(t) - L(end))``, by trapezoids between evaluations
- recovery tokens: from t0 to the first evaluation after the peak with ``L <= L(t0) + tolerance``
- final forgetting: ``L(end) - L(t0)``; negative means the domain was improved

Each is a lower bound as fine as the evaluations are dense: a peak between two of them is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewarm.tracking.metrics import EvaluationLine


@dataclass(frozen=True, slots=True)
class StabilityGap:
    """One old domain's curve in figures."""

    domain: str
    peak_rise: float
    """Nats per token; 0 if the loss was never above its start."""
    peak_tokens: int
    """Tokens from the first evaluation to the highest one."""
    area: float
    """Nats per token times tokens, above the final loss."""
    recovery_tokens: int | None
    """Tokens until the loss is back within the tolerance; 0 if it never left, None if it never came back."""
    final_forgetting: float
    """Nats per token; negative is an improvement."""
    worst_rise: float
    """Largest rise between any two evaluations, the earlier one the lower, in nats per token."""


def stability_gap(lines: Sequence[EvaluationLine], domain: str, *, tolerance: float = 0.01) -> StabilityGap:
    """The stability gap of one domain.

    Args:
        lines: evaluation lines of one run, in order; lines without a loss of the domain are passed over.
        domain: a domain that the model knew before the first line.
        tolerance: nats per token within which the loss counts as recovered.

    Raises:
        ValueError: with fewer than two evaluations of the domain.
    """
    tokens, losses = _curve(lines, domain)
    if len(losses) < 2:
        raise ValueError(f"domain {domain!r} has {len(losses)} evaluations; a stability gap needs at least two")
    start, end, peak = losses[0], losses[-1], int(np.argmax(losses))
    return StabilityGap(
        domain=domain,
        peak_rise=float(losses[peak] - start),
        peak_tokens=int(tokens[peak] - tokens[0]),
        area=_area_above(tokens.astype(np.float64), losses - end),
        recovery_tokens=_recovery(tokens, losses, peak, start + tolerance),
        final_forgetting=float(end - start),
        worst_rise=float(np.max(losses - np.minimum.accumulate(losses))),
    )


def worst_case_loss(lines: Sequence[EvaluationLine], old_domains: Sequence[str], new_domain: str) -> float:
    """``L_new(end) / k + (1 - 1/k) * mean_i max_t L_i(t)`` over the k - 1 old domains, in nats per token.

    De Lange et al.'s worst-case accuracy, for losses: what is learned against the worst of what was known.
    """
    new = _curve(lines, new_domain)[1]
    worst = [float(_curve(lines, domain)[1].max()) for domain in old_domains]
    share = 1 / (len(worst) + 1)
    return share * float(new[-1]) + (1 - share) * float(np.mean(worst)) if worst else float(new[-1])


def _curve(lines: Sequence[EvaluationLine], domain: str) -> tuple[np.ndarray, np.ndarray]:
    """int64 tokens and float64 losses [E] of the evaluations that have one."""
    points = []
    for line in lines:
        entry = line["domains"].get(domain)
        if entry is not None and entry["loss"] is not None:
            points.append((line["tokens"], entry["loss"]))
    return np.array([p[0] for p in points], dtype=np.int64), np.array([p[1] for p in points], dtype=np.float64)


def _area_above(tokens: np.ndarray, rises: np.ndarray) -> float:
    """Integral of the positive part of a piecewise linear curve, exact where it crosses zero."""
    left, right, width = rises[:-1], rises[1:], np.diff(tokens)
    high, low = np.maximum(left, right), np.minimum(left, right)
    both = width * (high + low) / 2
    fall = np.where(high > low, high - low, 1.0)
    crossing = width * high * high / fall / 2
    return float(np.where(low >= 0, both, np.where(high > 0, crossing, 0.0)).sum())


def _recovery(tokens: np.ndarray, losses: np.ndarray, peak: int, bound: float) -> int | None:
    if losses[peak] <= bound:
        return 0
    back = np.flatnonzero(losses[peak:] <= bound)
    return int(tokens[peak + back[0]] - tokens[0]) if len(back) else None

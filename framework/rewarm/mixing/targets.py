"""Target losses from a pilot run: each domain's loss curve, extrapolated to the data that the stage will have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewarm.errors import UserError
from rewarm.mixing.loss_table import LossLine
from rewarm.mixing.power_law import PowerLaw, fit_power_law


@dataclass(frozen=True, slots=True)
class Target:
    """What one domain should reach."""

    loss: float
    """Nats per token."""
    law: PowerLaw
    """Loss against the tokens of the whole pilot."""
    initial: float
    """Loss at the pilot's first evaluation."""
    final: float
    """Loss at its last."""


def fit_targets(
    table: Sequence[LossLine], total_tokens: int, *, domains: Sequence[str] | None = None, skip_tokens: int = 0
) -> dict[str, Target]:
    """Fit every domain of a pilot's evaluations and extrapolate.

    The pilot trains the same model on a sub-sample at the original weights (Luo et al. 2024). A learning rate that
    decays over the pilot bends its curve and makes the extrapolation too low at first and too high later: use a
    constant one, and skip the warm-up.

    Args:
        table: the pilot's evaluations; lines without tokens are refused.
        total_tokens: tokens that the stage will train on.
        domains: which domains; None means all of the first line.
        skip_tokens: evaluations at or before this are left out of the fit.

    Raises:
        UserError: if a domain is unknown or has too few evaluations.
    """
    chosen = list(table[0].losses) if domains is None else list(domains)
    targets = {}
    for name in chosen:
        if name not in table[0].losses:
            raise UserError(f"the pilot has no domain {name!r}: {', '.join(table[0].losses)}")
        points = [(line.tokens, line.losses.get(name, np.nan)) for line in table]
        usable = [(t, loss) for t, loss in points if t is not None and t > skip_tokens and np.isfinite(loss)]
        if len(usable) < 4:
            raise UserError(
                f"the pilot evaluated domain {name!r} {len(usable)} times after {skip_tokens} tokens; a law needs 4",
                fix="lower evaluation.interval of the pilot, or train it longer",
            )
        law = fit_power_law(np.array([t for t, _ in usable]), np.array([loss for _, loss in usable]))
        targets[name] = Target(float(law(total_tokens)), law, float(points[0][1]), float(usable[-1][1]))
    return targets

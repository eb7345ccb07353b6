"""The mean mixture of a run, from its weight log."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewarm.errors import UserError
from rewarm.mixing.weight_log import WeightEntry


def average_shares(
    entries: Sequence[WeightEntry], num_samples: int, names: Sequence[str], *, objective: bool
) -> dict[str, float]:
    """Mean over the samples of a run of the shares in force.

    For a mixer whose result is the mean of its weights over the steps (Xie et al. 2023, Fan et al. 2023) this is that
    mean; each update counts as long as it was in force.

    Args:
        entries: the weight log.
        num_samples: trained so far.
        names: domains among which the shares are divided.
        objective: of the loss instead of the samples, which are the same where an entry has no objective.

    Returns:
        By name, summing to 1.

    Raises:
        UserError: if nothing was trained, or the domains had no share.
    """
    changes = {entry.sample: entry for entry in entries if entry.sample < num_samples}
    if 0 not in changes:
        raise UserError(
            "there is nothing to average: no sample was trained, or the weight log has no entry for sample 0",
            fix="name a run that has trained and saved",
        )
    samples = sorted(changes)
    total: np.ndarray = np.zeros(len(names))
    for first, last in zip(samples, [*samples[1:], num_samples], strict=True):
        entry = changes[first]
        shares = entry.objective if objective and entry.objective is not None else entry.weights
        total += np.array([shares[name] for name in names], dtype=np.float64) * (last - first)
    if total.sum() == 0:
        raise UserError(f"the domains {', '.join(names)} had no share in the run")
    return dict(zip(names, (total / total.sum()).tolist(), strict=True))

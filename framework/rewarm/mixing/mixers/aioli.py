"""Aioli: weights from an interaction matrix that short probes estimate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewarm.errors import UserError
from rewarm.mixing.mixers.base import Mixer, Observation, softmax


class AioliMixer(Mixer):
    """Chen et al., "Aioli: A Unified Optimization Framework for Language Model Data Mixing", 2024.

    Probes on near-one-hot mixtures P (rows) lower the losses by B; the interaction matrix A, where ``A[j, i]`` is how
    much training on i lowers loss j, solves ``P A^T = B``. A is shifted to be not negative and scaled to sum to 1, then
    ``w = softmax(step_size * column sums of A)``, from uniform weights each time.

    Cost per update: rounds * probe steps * K training steps. State: weights.

    Args:
        names: K domains.
        weights: float64 [K], used until the first update.
        step_size: factor of the column sums; 0.1 to 0.5 in the published runs.
    """

    name = "aioli"
    needs = ("probe_mixes", "probe_drops")

    def __init__(self, names: Sequence[str], weights: np.ndarray, *, step_size: float = 0.2) -> None:
        super().__init__(names, weights)
        self.step_size = step_size

    def _next(self, observation: Observation) -> np.ndarray:
        mixes, drops = observation.probe_mixes, observation.probe_drops
        assert mixes is not None and drops is not None
        if np.linalg.matrix_rank(mixes) < len(self.names):
            raise UserError(
                f"the probes' mixtures do not tell the {len(self.names)} domains apart",
                fix="probe one mixture per domain, each with most of its share on that domain",
            )
        interaction = np.linalg.lstsq(mixes, drops, rcond=None)[0].T
        interaction = interaction - min(float(interaction.min()), 0.0)
        total = float(interaction.sum())
        return softmax(self.step_size * interaction.sum(axis=0) / total if total > 0 else np.zeros(len(self.names)))

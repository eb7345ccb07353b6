"""Aioli: weights from an interaction matrix that short probes estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from rewarm.config.registry import MIXERS
from rewarm.config.section import Section
from rewarm.errors import UserError
from rewarm.mixing.mixers.base import Mixer, MixerContext, Observation, softmax
from rewarm.mixing.permutation import KeyedPermutation, order_key

_LEAST_SINGULAR_VALUE = 0.05
"""Of the probes' mixtures, against the largest: below it they do not tell the domains apart."""


class AioliConfig(Section):
    """Weights from how much training on each domain lowers every loss, measured by probes (Chen et al. 2024).

    At each evaluation of a round's first part another domain's probe begins; then the mixture that they ask for holds.
    The probes are ordinary training steps of the run.
    """

    step_size: float = Field(0.2, gt=0)
    """Factor before the exponential; 0.1 to 0.5 in the published runs."""
    probe_share: float = Field(0.625, gt=0, le=1)
    """Share of the probed domain among the new ones, above an equal share; the others divide the rest. The published
    runs take 0.5 to 0.625."""
    probes_per_domain: int = Field(4, ge=1)
    """Probes of each domain in a round, one evaluation interval each; 4 in the published runs."""
    hold: int = Field(16, ge=1)
    """Evaluations that the mixture holds before the next round of probes."""
    matrix_decay: float = Field(0.0, ge=0, lt=1)
    """Share of the older rounds' measurements that each round keeps."""


class AioliMixer(Mixer):
    """Chen et al., "Aioli: A Unified Optimization Framework for Language Model Data Mixing", 2024, from given probes.

    Probes on near-one-hot mixtures P (rows) lower the losses by B; the interaction matrix A, where ``A[j, i]`` is how
    much training on i lowers loss j, solves ``P A^T = B``. A is shifted to be not negative and scaled to sum to 1, then
    ``w = softmax(step_size * column sums of A)``, from uniform weights each time.

    Cost per update: rounds * probe steps * K training steps. State: weights. In a run :class:`AioliRounds` makes the
    probes.

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
        if not tells_apart(mixes):
            raise UserError(
                f"the probes' mixtures do not tell the {len(self.names)} domains apart",
                fix="probe one mixture per domain, each with most of its share on that domain",
            )
        return softmax(self.step_size * interaction_matrix(mixes, drops).sum(axis=0))


@MIXERS.register("aioli", settings=AioliConfig)
class AioliRounds(Mixer):
    """Aioli inside a run: rounds of probes, then the mixture they ask for, all of it ordinary training.

    At each evaluation of a round's first part another domain's probe begins: ``probe_share`` of the new samples come
    from it, the rest equally from the others, in a permuted order, each domain ``probes_per_domain`` times. Between
    two evaluations the held-out losses fall by a row of B per token, on the mixture that was really trained on, a row
    of P: the samples that were under way when a probe was decided are counted as what they are. Then the rule of
    :class:`AioliMixer` gives the mixture, which holds for ``hold`` evaluations until the next round. Rounds whose
    samples do not tell the domains apart, because evaluations come faster than weights take effect, probe on.

    The published code keeps the mixture's own product over rounds where it does not average A; here every round starts
    from uniform weights, as with an average.

    Cost per update: the held-out losses; the probes train on mixtures that are nobody's choice. State: weights,
    mixture, matrix, place in the round, losses of the evaluation before, rows of P and B.

    Args:
        names: K domains.
        weights: float64 [K], used until the first probe.
        step_size: factor of the column sums.
        probe_share: own share of a probed domain, above 1/K.
        probes_per_domain: sweeps over the domains in a round.
        hold: evaluations that the mixture holds.
        matrix_decay: share of the older rounds' matrix that each round keeps.

    Raises:
        UserError: if a probe would be no different from equal weights.
    """

    name = "aioli"
    needs = ("losses", "training_counts")

    def __init__(
        self,
        names: Sequence[str],
        weights: np.ndarray,
        *,
        step_size: float = 0.2,
        probe_share: float = 0.625,
        probes_per_domain: int = 4,
        hold: int = 16,
        matrix_decay: float = 0.0,
    ) -> None:
        super().__init__(names, weights)
        if len(self.names) > 1 and probe_share <= 1 / len(self.names):
            raise UserError(
                f"mixture.aioli.probe_share={probe_share} of {len(self.names)} domains is no more than an equal share",
                fix=f"set it above {1 / len(self.names):.4g}",
            )
        self.step_size, self.probe_share, self.matrix_decay = step_size, probe_share, matrix_decay
        self.num_probes, self.hold = probes_per_domain * len(self.names), hold
        self.mixture = self.weights.copy()
        self.matrix: np.ndarray | None = None
        self.before: np.ndarray | None = None
        """float64 [K]; losses of the last evaluation."""
        self.probe, self.held = 0, -1
        """Probes begun since the start of the run; evaluations that the mixture has held, -1 while probing."""
        self.mixes: list[list[float]] = []
        self.drops: list[list[float]] = []

    @classmethod
    def build_for_table(cls, context: MixerContext, settings: AioliConfig) -> Mixer:
        """The rule alone: a table brings its own probes."""
        return AioliMixer(context.names, context.weights, step_size=settings.step_size)

    def _next(self, observation: Observation) -> np.ndarray:
        losses, counts = observation.losses, observation.training_counts
        assert losses is not None and counts is not None
        if len(self.names) == 1:
            return self.weights
        before, self.before = self.before, losses.copy()
        if self.held < 0 and before is not None and counts.sum() > 0:
            self.mixes.append((counts / counts.sum()).tolist())
            self.drops.append(((before - losses) / counts.sum()).tolist())
        if self.held < 0 and len(self.mixes) >= self.num_probes and tells_apart(np.array(self.mixes)):
            self._solve()
            return self.mixture
        self.held += self.held >= 0
        if 0 <= self.held < self.hold:
            self.note = "mixture held"
            return self.mixture
        self.held = -1
        return self._begin_probe()

    def _begin_probe(self) -> np.ndarray:
        sweep, place = divmod(self.probe, len(self.names))
        order = KeyedPermutation(len(self.names), order_key(0, "aioli probes", sweep))
        chosen = int(order(np.array([place]))[0])
        self.probe += 1
        self.note = f"probe of {self.names[chosen]}"
        weights = np.full(len(self.names), (1 - self.probe_share) / (len(self.names) - 1))
        weights[chosen] = self.probe_share
        return weights

    def _solve(self) -> None:
        fresh = interaction_matrix(np.array(self.mixes), np.array(self.drops))
        kept = 0.0 if self.matrix is None else self.matrix_decay
        self.matrix = fresh if self.matrix is None else kept * self.matrix + (1 - kept) * fresh
        self.mixture = softmax(self.step_size * self.matrix.sum(axis=0))
        self.note = f"mixture from {len(self.mixes)} probes"
        self.mixes, self.drops, self.held = [], [], 0

    def adopt(self, weights: np.ndarray) -> None:
        """Take the fractions that will really be used; outside a round of probes they are the mixture."""
        super().adopt(weights)
        if self.held >= 0:
            self.mixture = self.weights.copy()

    def details(self) -> dict[str, dict[str, float]]:
        """How much training on each domain lowers all losses, as shares, once a round has measured it."""
        return {} if self.matrix is None else {"effect": self._by_name(self.matrix.sum(axis=0))}

    def state_dict(self) -> dict[str, Any]:
        """Weights, mixture, matrix, the place in the round and its measurements."""
        return super().state_dict() | {
            "mixture": self.mixture.tolist(),
            "matrix": None if self.matrix is None else self.matrix.tolist(),
            "before": None if self.before is None else self.before.tolist(),
            "probe": self.probe,
            "held": self.held,
            "mixes": self.mixes,
            "drops": self.drops,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.mixture = np.array(state["mixture"], dtype=np.float64)
        self.matrix = None if state["matrix"] is None else np.array(state["matrix"], dtype=np.float64)
        self.before = None if state["before"] is None else np.array(state["before"], dtype=np.float64)
        self.probe, self.held = int(state["probe"]), int(state["held"])
        self.mixes = [list(map(float, row)) for row in state["mixes"]]
        self.drops = [list(map(float, row)) for row in state["drops"]]


def tells_apart(mixes: np.ndarray) -> bool:
    """True if mixtures, float64 [P, K], vary enough to see each domain's effect."""
    values = np.linalg.svd(mixes, compute_uv=False)
    return len(values) == mixes.shape[1] and bool(values[-1] >= _LEAST_SINGULAR_VALUE * values[0])


def interaction_matrix(mixes: np.ndarray, drops: np.ndarray) -> np.ndarray:
    """How much training on each domain (column) lowers each loss (row), shifted to be not negative and scaled to 1.

    Args:
        mixes: float64 [P, K]; what each probe trained on, rows summing to 1.
        drops: float64 [P, K]; by how much it lowered each domain's loss.

    Returns:
        float64 [K, K] summing to 1; all 0 if nothing changed any loss.
    """
    matrix = np.linalg.lstsq(mixes, drops, rcond=None)[0].T
    matrix = matrix - min(float(matrix.min()), 0.0)
    total = float(matrix.sum())
    return matrix / total if total > 0 else matrix

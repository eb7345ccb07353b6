"""The mixture that the loss stands for, where it is another one than the mixture that is sampled.

Domain d has the share ``q`` of the samples and the share ``w`` of the objective; each of its windows counts ``w / q``
times. The expectation of a window's weighted loss is then the mean loss under the mixture ``w``.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import TOTAL, align, quantise


def objective_weights(objective: Mapping[str, float], weights: Mapping[str, int]) -> dict[str, int]:
    """Shares of the objective beside the shares of the samples.

    The domains that ``objective`` names divide among themselves what they are sampled at together; every other domain,
    as a replayed one, keeps its own share, so that its windows count once. What is named but not sampled cannot be
    estimated from samples: its part goes to the other named domains. If no domain is left that is sampled and has a
    weight, because a cap on passes or a phase took them all, nothing of the objective can be estimated: every window
    counts once (see :func:`is_estimable`).

    Args:
        objective: weight of some domains, any scale.
        weights: integers summing to 2^32, of all domains.

    Returns:
        Integers summing to 2^32, of all domains in the order of ``weights``.
    """
    if not is_estimable(objective, weights):
        return dict(weights)
    wanted = {name: weight for name, weight in objective.items() if weights[name] > 0}
    budget, total = sum(weights[name] for name in wanted), sum(wanted.values())
    shares = {name: 0.0 if name in objective else float(weight) for name, weight in weights.items()}
    shares |= {name: budget * weight / total for name, weight in wanted.items()}
    return dict(zip(weights, quantise(list(shares.values())).tolist(), strict=True))


def is_estimable(objective: Mapping[str, float], weights: Mapping[str, int]) -> bool:
    """Whether any domain with a weight in the objective is sampled."""
    return any(weight > 0 and weights[name] > 0 for name, weight in objective.items())


class Objective:
    """The factor of every sample, from the entries of the weight log.

    Args:
        names: the domains, in the order that draws index.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._samples: list[int] = []
        self._entries: dict[int, WeightEntry] = {}

    def schedule(self, entry: WeightEntry) -> None:
        """Let an entry hold from its sample on; of several at one sample the last one holds."""
        if entry.sample not in self._entries:
            insort(self._samples, entry.sample)
        self._entries[entry.sample] = entry

    def factors(self, start: int, domains: np.ndarray) -> np.ndarray | None:
        """``w / q`` of consecutive samples.

        Args:
            start: global sample index of the first.
            domains: int64 [n].

        Returns:
            float64 [n]; None where no entry in force has an objective.
        """
        held = self._held(start, start + len(domains))
        if all(entry.objective is None for entry in held):
            return None
        factors: np.ndarray = np.ones(len(domains))
        for entry in held:
            first = max(0, entry.sample - start)
            factors[first:] = self._of(entry)[domains[first:]]
        return factors

    def shares(self, sample: int) -> np.ndarray | None:
        """float64 [K]; shares of the objective in force for a sample, or None where it is what is sampled."""
        entry = next(iter(self._held(sample, sample + 1)), None)
        return None if entry is None or entry.objective is None else align(entry.objective, self._names) / TOTAL

    def state_dict(self, sample: int) -> list[dict[str, Any]]:
        """The entries that matter from a sample on, as plain JSON values."""
        return [entry.to_dict() for entry in self._held(sample, None)]

    def load_state_dict(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self._samples, self._entries = [], {}
        for value in state:
            self.schedule(WeightEntry.from_dict(value))

    def _held(self, start: int, stop: int | None) -> list[WeightEntry]:
        """The entry in force at ``start``, if any, and those that follow before ``stop``."""
        first = max(0, bisect_right(self._samples, start) - 1)
        last = None if stop is None else bisect_right(self._samples, stop - 1)
        return [self._entries[sample] for sample in self._samples[first:last]]

    def _of(self, entry: WeightEntry) -> np.ndarray:
        if entry.objective is None:
            return np.ones(len(self._names))
        objective, weights = align(entry.objective, self._names), align(entry.weights, self._names)
        # What is not sampled has no window to weight.
        return objective / np.maximum(weights, 1)

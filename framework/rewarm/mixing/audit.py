"""Rebuild a run's samples from its weight log alone, and compare them with what training logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewarm.errors import UserError
from rewarm.mixing.draws import sample_hash
from rewarm.mixing.order import DomainOrder
from rewarm.mixing.repetition import effective_tokens
from rewarm.mixing.sampler import SampledDomain, Sampler, sampled_domain
from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import align


@dataclass(slots=True)
class DomainUse:
    """What a run took of one domain, and what its lineage had taken of it before."""

    windows: int
    """Windows the domain has."""
    drawn: int
    """Samples that the run drew from it."""
    seen: int
    """Different windows among them."""
    most_repeated: int
    """How often the run drew the window that it drew most often."""
    drawn_before: int = 0
    """Samples that the ancestors drew from it."""
    seen_before: int = 0
    """Different windows among those."""
    known: int = 0
    """Of :attr:`seen`, those that an ancestor had drawn."""

    @property
    def fresh(self) -> int:
        """Different windows that nobody of the lineage had drawn before."""
        return self.seen - self.known

    @property
    def effective(self) -> float:
        """Fresh windows that the run's samples are worth (Muennighoff et al. 2023): what all samples of the lineage are
        worth with them, less what they are without. The formula knows the mean of the repeats, so that a fresh window
        beside others that were repeated often is worth a little more than itself."""
        different, drawn = self.seen_before + self.fresh, self.drawn_before + self.drawn
        return _worth(different, drawn) - _worth(self.seen_before, self.drawn_before)


def _worth(different: int, drawn: int) -> float:
    return effective_tokens(different, drawn / different) if different else 0.0


@dataclass(slots=True)
class Audit:
    """The comparison."""

    steps: int
    """Steps rebuilt."""
    compared: int
    """Steps whose hash was logged."""
    different: list[int] = field(default_factory=list)
    """Steps whose hash is not the logged one."""
    domains: dict[str, DomainUse] = field(default_factory=dict)


def audit(
    sampler_state: Mapping[str, Any],
    entries: Sequence[WeightEntry],
    hashes: Mapping[int, str],
    batch_size: int,
    before: Callable[[str, int], np.ndarray] | None = None,
) -> Audit:
    """Draw a run's samples again.

    Args:
        sampler_state: of one of the run's checkpoints; only its seed and its domains are used.
        entries: the weight log.
        hashes: logged hash of each step, counted from 1.
        batch_size: samples per step.
        before: from a domain's fingerprint and number of windows to how often its ancestors drew each, int [windows];
            None takes what the state says: the windows of the run's order before its start, or those it replays.

    Raises:
        UserError: if the log does not say what the run began with, or nothing was logged.
    """
    first = next((entry for entry in reversed(entries) if entry.sample == 0), None)
    if first is None:
        raise UserError("the weight log has no entry for sample 0", fix="restore mixture.jsonl")
    if not hashes:
        raise UserError("the run logged no sample hash", fix="audit a run that has trained at least one step")
    domains = [sampled_domain(entry) for entry in sampler_state["domains"]]
    names = [domain.name for domain in domains]
    sampler = Sampler(domains, sampler_state["seed"], align(first.weights, names))
    for entry in entries:
        sampler.schedule_weights(align(entry.weights, names), entry.sample)
    result = Audit(steps=max(hashes), compared=len(hashes))
    for step in range(1, max(hashes) + 1):
        draw = sampler.draw(batch_size)
        if step in hashes and sample_hash(names, draw) != hashes[step]:
            result.different.append(step)
    for domain, cursor in zip(domains, sampler.cursors.tolist(), strict=True):
        order = DomainOrder(domain.num_windows, domain.fingerprint, sampler.seed, domain.parts)
        earlier = _before(order, domain) if before is None else before(domain.fingerprint, domain.num_windows)
        result.domains[domain.name] = use_of(order.counts(domain.start, cursor), earlier)
    return result


def use_of(counts: np.ndarray, before: np.ndarray) -> DomainUse:
    """What a run took of a domain.

    Args:
        counts: int [windows]; how often it drew each window.
        before: int [windows]; how often its ancestors had.
    """
    return DomainUse(
        windows=len(counts),
        drawn=int(counts.sum()),
        seen=int(np.count_nonzero(counts)),
        most_repeated=int(counts.max()),
        drawn_before=int(before.sum()),
        seen_before=int(np.count_nonzero(before)),
        known=int(np.count_nonzero((counts > 0) & (before > 0))),
    )


def _before(order: DomainOrder, domain: SampledDomain) -> np.ndarray:
    """What the state of a sampler says of the ancestors' draws."""
    counts = order.counts(0, domain.start)
    if domain.once:  # the parts are what the ancestors left of an order
        return counts + DomainOrder(order.size, order.fingerprint, domain.parts[0].seed).counts(
            0, domain.parts[0].start
        )
    return counts + order.counts(0, sum(map(len, domain.parts)))


def logged_hashes(lines: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Step to sample hash of the lines of a ``metrics.jsonl``."""
    return {int(line["step"]): str(line["sample_hash"]) for line in lines}

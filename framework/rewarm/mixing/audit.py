"""Rebuild a run's samples from its weight log alone, and compare them with what training logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewarm.errors import UserError
from rewarm.mixing.draws import sample_hash
from rewarm.mixing.repetition import effective_tokens
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import align


@dataclass(slots=True)
class DomainUse:
    """What a run took of one domain."""

    windows: int
    """Windows the domain has."""
    drawn: int
    """Samples drawn from it."""
    seen: int
    """Different windows among them."""
    most_repeated: int
    """How often the most used window was drawn."""

    @property
    def effective(self) -> float:
        """Fresh windows that its samples are worth (Muennighoff et al. 2023)."""
        return effective_tokens(self.windows, self.drawn / self.windows)


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
    sampler_state: Mapping[str, Any], entries: Sequence[WeightEntry], hashes: Mapping[int, str], batch_size: int
) -> Audit:
    """Draw a run's samples again.

    Args:
        sampler_state: of one of the run's checkpoints; only its seed and its domains are used.
        entries: the weight log.
        hashes: logged hash of each step, counted from 1.
        batch_size: samples per step.

    Raises:
        UserError: if the log does not say what the run began with, or nothing was logged.
    """
    first = next((entry for entry in reversed(entries) if entry.sample == 0), None)
    if first is None:
        raise UserError("the weight log has no entry for sample 0", fix="restore mixture.jsonl")
    if not hashes:
        raise UserError("the run logged no sample hash", fix="audit a run that has trained at least one step")
    domains = [
        SampledDomain(d["name"], d["num_windows"], d["fingerprint"], start=d["start"]) for d in sampler_state["domains"]
    ]
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
        size = domain.num_windows
        passes = -(-cursor // size)
        result.domains[domain.name] = DomainUse(size, cursor, min(cursor, size), passes)
    return result


def logged_hashes(lines: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Step to sample hash of the lines of a ``metrics.jsonl``."""
    return {int(line["step"]): str(line["sample_hash"]) for line in lines}

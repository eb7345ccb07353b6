"""Which windows of a lineage's domain are fed back, and which of them the lineage drew before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np

from rewarm.errors import UserError
from rewarm.mixing.order import DomainOrder, Part
from rewarm.replay.lineage import ConsumedDomain, Lineage, order_identity, split_order


@dataclass(frozen=True, slots=True)
class ReplayOrder:
    """The order in which a stage draws a replayed domain."""

    order: str
    """Identity of the order that it consumes, see :func:`rewarm.replay.lineage.order_identity`."""
    start: int
    """Windows drawn of it before."""
    parts: tuple[Part, ...] = ()
    """What it draws; empty for the whole order of the run's seed."""
    once: bool = False
    """True if no window may come twice."""
    replayed: bool = False
    """True if it draws what the lineage trained on, and so consumes nothing new."""


def replay_order(
    lineage: Lineage, windows: Literal["seen", "unseen", "all"], domain: ConsumedDomain, num_windows: int, seed: int
) -> ReplayOrder:
    """The order of a replayed domain.

    Args:
        lineage: of the run's parent.
        windows: ``replay.windows``.
        domain: of that lineage.
        num_windows: that the stage cuts it into.
        seed: of the run.

    Raises:
        UserError: if it cannot be told which of the stage's windows the lineage trained on, or there are none.
    """
    own = order_identity(domain.fingerprint, num_windows, seed)
    if windows == "all":
        return ReplayOrder(own, lineage.drawn(own))
    parts = _consumed(lineage, domain, num_windows)
    if windows == "seen":
        again = [record for record in _records(lineage, domain.fingerprint) if record.replayed]
        start = sum(record.windows for record in again if _same_windows(record, num_windows))
        return ReplayOrder(own, start, parts or (Part(seed, 0, num_windows),), replayed=True)
    if windows == "unseen":
        return _unseen(lineage, parts, domain, num_windows)
    assert_never(windows)


def _unseen(lineage: Lineage, parts: tuple[Part, ...], domain: ConsumedDomain, num_windows: int) -> ReplayOrder:
    """What none of the lineage's stages has drawn of a domain, whose consumed ``parts`` are given."""
    seeds = {part.seed for part in parts}
    drawn = max((lineage.drawn(order_identity(domain.fingerprint, num_windows, each)) for each in seeds), default=0)
    if not parts or drawn >= num_windows:
        raise UserError(
            f"replay.windows=unseen, but the lineage trained on all {num_windows} windows of domain {domain.name!r}",
            fix="set replay.windows=seen, or leave it out with replay.domains",
        )
    if len(seeds) > 1:
        raise UserError(
            f"replay.windows=unseen, but the stages of the lineage drew domain {domain.name!r} in the orders of "
            f"{len(seeds)} seeds ({', '.join(map(str, sorted(seeds)))}), which leaves no order of what none has drawn",
            fix="set replay.windows=seen or replay.windows=all, or leave it out with replay.domains",
        )
    left = Part(seeds.pop(), drawn, num_windows)
    return ReplayOrder(order_identity(domain.fingerprint, num_windows, left.seed), 0, (left,), once=True)


def drawn_before(lineage: Lineage, fingerprint: str, num_windows: int) -> np.ndarray:
    """How often each window of a domain was drawn by the stages of a lineage, replayed or not, int32 [num_windows].

    Stages that cut it into windows of another length are left out.
    """
    counts = np.zeros(num_windows, dtype=np.int32)
    for index, stage in enumerate(lineage.stages):
        before = Lineage(lineage.stages[:index])
        for record in stage.domains:
            if record.fingerprint != fingerprint or not record.windows or not _same_windows(record, num_windows):
                continue
            seed = split_order(record.order)[1]
            found = ReplayOrder(record.order, before.drawn(record.order))
            if record.replayed:
                found = replay_order(before, "seen", record, num_windows, seed)
            counts += DomainOrder(num_windows, fingerprint, seed, found.parts).counts(found.start, record.windows)
    return counts


def _consumed(lineage: Lineage, domain: ConsumedDomain, num_windows: int) -> tuple[Part, ...]:
    """What the lineage consumed of a domain, the oldest stage first; empty if it is all of it, in windows of another
    length."""
    records = [record for record in _records(lineage, domain.fingerprint) if not record.replayed]
    if all(_same_windows(record, num_windows) for record in records):
        return _stretches(records)
    for order in {record.order for record in records if record.order}:
        if lineage.drawn(order) >= split_order(order)[0]:
            return ()
    lengths = sorted({record.tokens // record.windows for record in records})
    raise UserError(
        f"the lineage trained on part of domain {domain.name!r}, in windows of "
        f"{' and '.join(map(str, lengths))} tokens and not in the {num_windows} windows of this stage: which of these "
        "it has seen is not known",
        fix=f"set replay.windows=all, or batch.sequence_length={lengths[-1]}, or leave it out with replay.domains",
    )


def _stretches(records: Sequence[ConsumedDomain]) -> tuple[Part, ...]:
    """What records consumed of their orders, those joined that follow one another."""
    result: list[Part] = []
    drawn: dict[str, int] = {}
    for record in records:
        start = drawn.get(record.order, 0)
        drawn[record.order] = stop = start + record.windows
        seed = split_order(record.order)[1]
        if result and (result[-1].seed, result[-1].stop) == (seed, start):
            start = result.pop().start
        result.append(Part(seed, start, stop))
    return tuple(result)


def _records(lineage: Lineage, fingerprint: str) -> list[ConsumedDomain]:
    domains = [domain for stage in lineage.stages for domain in stage.domains]
    return [domain for domain in domains if domain.fingerprint == fingerprint and domain.windows]


def _same_windows(record: ConsumedDomain, num_windows: int) -> bool:
    return bool(record.order) and split_order(record.order)[0] == num_windows

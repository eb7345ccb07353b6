"""The global order of samples, as a pure function of seed, domains, weight changes and sample index."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewarm.errors import UserError, ensure
from rewarm.mixing.draws import Draw
from rewarm.mixing.native import sampler_library
from rewarm.mixing.order import Part, WindowOrder
from rewarm.mixing.permutation import MAX_SIZE, ORDER_VERSION
from rewarm.mixing.weights import TOTAL, align

__all__ = ["Draw", "SampledDomain", "Sampler"]


@dataclass(frozen=True, slots=True)
class SampledDomain:
    """A domain as the sampler sees it."""

    name: str
    num_windows: int
    """Windows of its training split, at least 1."""
    fingerprint: str
    """Hash of its content; it chooses the order of the windows, so a renamed domain keeps its order."""
    max_epochs: float | None = None
    """Most passes over it in this run; None means no limit."""
    start: int = 0
    """Windows of its order that the lineage drew before this run, which goes on after them."""
    parts: tuple[Part, ...] = ()
    """Stretches of orders that are drawn one after the other, and again from the first, instead of the order of the
    run's seed; ``start`` is then a place in them."""
    once: bool = False
    """True if each window of the parts may be drawn only once."""

    @property
    def pool(self) -> int:
        """Different windows that it is drawn from, those of several orders counted as if none were in two."""
        return min(sum(map(len, self.parts)), self.num_windows) if self.parts else self.num_windows

    @property
    def limit(self) -> int | None:
        """Most windows that may be drawn in this run, or None."""
        if self.once:
            return sum(map(len, self.parts)) - self.start
        return None if self.max_epochs is None else math.floor(round(self.max_epochs * self.num_windows, 6))


def sampled_domain(entry: Mapping[str, Any]) -> SampledDomain:
    """A domain from its entry in :meth:`Sampler.state_dict`, without its ``max_epochs``."""
    parts = tuple(Part(*part) for part in entry.get("parts", []))
    name, size, content, start = (entry[key] for key in ("name", "num_windows", "fingerprint", "start"))
    return SampledDomain(name, size, content, start=start, parts=parts, once=entry.get("once", False))


class Sampler:
    """Draws windows of several domains in proportion to integer weights.

    Domains are picked by credits (:func:`rewarm.mixing.order.pick`), so every prefix of the order holds each domain's
    share to within a sample or two. Each domain's windows come in a keyed random order, epoch after epoch; a cursor
    only ever moves forward, so no change of weights repeats or skips a window before its epoch ends. No rank is known
    here: ranks take slices of what is drawn.

    Args:
        domains: at least one, names and fingerprints all different.
        seed: seed of the run.
        weights: int64 [K] summing to 2^32, see :func:`rewarm.mixing.weights.quantise`.
        native: use the C++ library where it was built; the samples are the same.

    Raises:
        UserError: if a domain has no window or two domains share a name or their content.
    """

    def __init__(
        self, domains: Sequence[SampledDomain], seed: int, weights: np.ndarray, *, native: bool = True
    ) -> None:
        _check_domains(domains)
        self.domains = tuple(domains)
        self.names = [domain.name for domain in domains]
        self.seed = seed
        self.sample_index = 0
        """Global index of the next sample."""
        self._weights = _checked(weights, len(domains))
        self._pending: list[tuple[int, np.ndarray]] = []
        self._credits = np.zeros(len(domains), dtype=np.int64)
        self._cursors = np.zeros(len(domains), dtype=np.int64)
        self._starts = np.array([domain.start for domain in domains], dtype=np.int64)
        sizes, fingerprints = [d.num_windows for d in domains], [d.fingerprint for d in domains]
        library = sampler_library() if native else None
        parts = [domain.parts for domain in domains]
        self._order = WindowOrder(sizes, fingerprints, seed, library=library, parts=parts)

    @property
    def weights(self) -> np.ndarray:
        """int64 [K]; the weights in effect for the next sample."""
        return self._weights.copy()

    @property
    def pending(self) -> list[tuple[int, np.ndarray]]:
        """Changes that are still to come, as (sample index, int64 [K]) in order."""
        return [(sample, weights.copy()) for sample, weights in self._pending]

    @property
    def cursors(self) -> np.ndarray:
        """int64 [K]; windows drawn so far from each domain, in this run."""
        return self._cursors.copy()

    def epochs(self) -> dict[str, float]:
        """Passes made over each domain's windows so far, in this run: what its ancestors drew is not in them."""
        return {d.name: int(c) / d.pool for d, c in zip(self.domains, self._cursors, strict=True)}

    def fingerprint(self) -> str:
        """Hash of what decides the order apart from the weights: algorithm version, seed, domains' content and size."""
        content = [[d.fingerprint, d.num_windows, d.start, *_parts_dict(d).values()] for d in self.domains]
        text = json.dumps([ORDER_VERSION, self.seed, content])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def schedule_weights(self, weights: np.ndarray, at_sample: int) -> None:
        """Let other weights take effect at a global sample index, which may lie inside a batch.

        Of several changes at the same index the last one holds.

        Args:
            weights: int64 [K] summing to 2^32.
            at_sample: not below :attr:`sample_index`.

        Raises:
            UserError: if the samples from ``at_sample`` on have been drawn already.
        """
        weights = _checked(weights, len(self.domains))
        if at_sample < self.sample_index:
            raise UserError(
                f"weights cannot take effect at sample {at_sample}: {self.sample_index} samples were drawn already"
            )
        self._pending = [change for change in self._pending if change[0] != at_sample]
        self._pending.append((at_sample, weights))
        self._pending.sort(key=lambda change: change[0])
        self._take_effect()

    def draw(self, n: int) -> Draw:
        """The next ``n`` samples of the global order.

        Raises:
            UserError: if a domain would be drawn more often than its ``max_epochs`` allows (to within one window, the
                rounding of the credits). Nothing is drawn then.
        """
        credits, cursors = self._credits.copy(), self._starts + self._cursors
        pieces = [
            self._order.draw(weights, credits, cursors, last - first)
            for first, last, weights in self._segments(self.sample_index + n)
        ]
        cursors -= self._starts
        self._check_limits(cursors)
        start, self.sample_index = self.sample_index, self.sample_index + n
        self._credits, self._cursors = credits, cursors
        self._take_effect()
        empty = np.empty(0, dtype=np.int64)
        domains, windows = (np.concatenate([empty, *(piece[part] for piece in pieces)]) for part in (0, 1))
        return Draw(start, domains, windows)

    def projected(self, total_samples: int) -> dict[str, float]:
        """Windows of each domain that will have been drawn by a global sample index, if the known weights stay.

        It does not depend on how far the sampler has drawn, because a domain's count and credit together are what its
        weights add up to; the count itself is within a sample or two.
        """
        return {d.name: amount / TOTAL for d, amount in zip(self.domains, self._owed(total_samples), strict=True)}

    def plan(self, total_samples: int) -> dict[str, float]:
        """What drawing up to a global sample index will take from each domain, if the known weights stay.

        Returns:
            Passes of this run over each domain's windows by then.

        Raises:
            UserError: if that exceeds a domain's ``max_epochs``, naming the domain and both numbers.
        """
        owed = self._owed(total_samples)
        for domain, amount in zip(self.domains, owed, strict=True):
            # Each weight is rounded by at most one unit, which adds at most one unit per sample.
            if domain.limit is not None and amount > domain.limit * TOTAL + total_samples:
                raise UserError(
                    f"domain {domain.name!r} has {_allowed(domain)}, but {total_samples} samples would take "
                    f"{amount / TOTAL:.0f} of it ({amount / TOTAL / domain.pool:.3g} passes)",
                    fix=_WIDEN if domain.once else "raise its max_epochs, lower its weight, or shorten the stage",
                )
        return {d.name: amount / TOTAL / d.pool for d, amount in zip(self.domains, owed, strict=True)}

    def _owed(self, total_samples: int) -> list[int]:
        """Weight that each domain will have received, in units of 2^-32 samples."""
        owed = [int(c) + int(cursor) * TOTAL for c, cursor in zip(self._credits, self._cursors, strict=True)]
        for first, last, weights in self._segments(total_samples):
            owed = [amount + int(weight) * (last - first) for amount, weight in zip(owed, weights, strict=True)]
        return owed

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the samples to come, as plain JSON values."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "sample_index": self.sample_index,
            "domains": [
                {
                    "name": domain.name,
                    "num_windows": domain.num_windows,
                    "fingerprint": domain.fingerprint,
                    "start": domain.start,
                    **_parts_dict(domain),
                    "cursor": int(self._cursors[index]),
                    "credit": int(self._credits[index]),
                }
                for index, domain in enumerate(self.domains)
            ],
            "weights": self._named(self._weights),
            "pending": [{"sample": sample, "weights": self._named(weights)} for sample, weights in self._pending],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another sampler stood.

        With the same domains everything is restored. Where domains were added or dropped, the cursors and credits of
        the others are restored, an added domain starts at its first window, what a dropped one was owed is spread over
        the rest, and this sampler's own weights hold: weights and pending changes of another set of domains mean
        nothing here.

        Args:
            state: what :meth:`state_dict` gave, also after a trip through JSON.

        Raises:
            UserError: if the order of the samples would change: another version of the algorithm, another seed,
                other content or size of a domain, or the same domains in another order.
        """
        stored = _stored_domains(state, self)
        known = [stored.get(domain.name) for domain in self.domains]
        self.sample_index = int(state["sample_index"])
        self._cursors = np.array([entry["cursor"] if entry else 0 for entry in known], dtype=np.int64)
        self._credits = np.array([entry["credit"] if entry else 0 for entry in known], dtype=np.int64)
        self._pending = []
        if list(stored) == self.names:
            self._weights = align(state["weights"], self.names)
            self._pending = [
                (int(change["sample"]), align(change["weights"], self.names)) for change in state["pending"]
            ]
        share, rest = divmod(-int(self._credits.sum()), len(self.domains))
        self._credits += share
        self._credits[:rest] += 1

    def _named(self, weights: np.ndarray) -> dict[str, int]:
        return {name: int(weight) for name, weight in zip(self.names, weights, strict=True)}

    def _segments(self, end: int) -> list[tuple[int, int, np.ndarray]]:
        """The samples from here to ``end``, cut where weights change: (first, last + 1, weights)."""
        changes = [(self.sample_index, self._weights)] + [change for change in self._pending if change[0] < end]
        ends = [sample for sample, _ in changes[1:]] + [end]
        return [(first, last, w) for (first, w), last in zip(changes, ends, strict=True) if last > first]

    def _take_effect(self) -> None:
        while self._pending and self._pending[0][0] <= self.sample_index:
            self._weights = self._pending.pop(0)[1]

    def _check_limits(self, cursors: np.ndarray) -> None:
        for domain, cursor in zip(self.domains, cursors, strict=True):
            if domain.limit is not None and cursor > domain.limit + 1:
                raise UserError(
                    f"domain {domain.name!r} is used up: it has {_allowed(domain)}, which allow {domain.limit} "
                    f"samples, and the next batch needs sample {int(cursor)}",
                    fix=_WIDEN if domain.once else "raise its max_epochs, lower its weight, or shorten the stage",
                )


_WIDEN = "lower replay.fraction, shorten the stage, or set replay.windows=all"


def _allowed(domain: SampledDomain) -> str:
    if domain.once:
        return f"{domain.limit} windows that the lineage has not trained on"
    return f"{domain.num_windows} windows and max_epochs={domain.max_epochs}"


def _parts_dict(domain: SampledDomain) -> dict[str, Any]:
    """The parts as plain JSON values; nothing where there are none, which is how older states are written."""
    if not domain.parts:
        return {}
    return {"parts": [[part.seed, part.start, part.stop] for part in domain.parts], "once": domain.once}


def _check_domains(domains: Sequence[SampledDomain]) -> None:
    if not domains:
        raise UserError("there is no domain to sample from", fix="name at least one domain")
    seen: dict[str, str] = {}
    for domain in domains:
        if not 1 <= domain.num_windows <= MAX_SIZE:
            raise UserError(
                f"domain {domain.name!r} has {domain.num_windows} windows",
                fix="give it at least sequence_length + 1 tokens, or remove it",
            )
        if domain.name in seen.values():
            raise UserError(f"two domains are called {domain.name!r}", fix="rename one of them")
        if domain.fingerprint in seen:
            raise UserError(
                f"domains {seen[domain.fingerprint]!r} and {domain.name!r} have the same content",
                fix="keep one of them and give it the weight of both",
            )
        seen[domain.fingerprint] = domain.name


def _checked(weights: np.ndarray, count: int) -> np.ndarray:
    weights = np.array(weights, dtype=np.int64)
    ensure(weights.shape == (count,), f"{weights.shape} weights for {count} domains")
    ensure(weights.min() >= 0 and int(weights.sum()) == TOTAL, f"weights sum to {int(weights.sum())}, not 2^32")
    return weights


def _stored_domains(state: Mapping[str, Any], sampler: Sampler) -> dict[str, dict[str, Any]]:
    """The domains of a state by name, after refusing all that would reorder samples."""
    if state["order_version"] != ORDER_VERSION:
        raise UserError(
            f"the checkpoint's samples were ordered by algorithm version {state['order_version']}; this program orders "
            f"by version {ORDER_VERSION}, which would repeat some windows and skip others",
            fix="resume with the version of rewarm that wrote it, or start a new stage with it as parent",
        )
    if state["seed"] != sampler.seed:
        raise UserError(
            f"the checkpoint's samples were ordered by seed {state['seed']}, this run has seed {sampler.seed}",
            fix=f"set seed={state['seed']}",
        )
    stored = {entry["name"]: dict(entry) for entry in state["domains"]}
    for domain in sampler.domains:
        if domain.name not in stored:
            continue
        entry = stored[domain.name]
        for key in ("fingerprint", "num_windows", "start"):
            if entry[key] != getattr(domain, key):
                raise UserError(
                    f"domain {domain.name!r} changed: its {key} was {entry[key]} when the checkpoint was written and "
                    f"is {getattr(domain, key)} now",
                    fix="restore its files and the sequence length, or give the changed data another name",
                )
        if {key: entry[key] for key in ("parts", "once") if key in entry} != _parts_dict(domain):
            raise UserError(
                f"the windows of domain {domain.name!r} that are replayed are others than when the checkpoint was "
                "written",
                fix="restore replay.windows and lineage.json as they were",
            )
    if set(stored) == set(sampler.names) and list(stored) != sampler.names:
        raise UserError(
            f"the domains are listed as {sampler.names}, the checkpoint has them as {list(stored)}",
            fix="list them in the checkpoint's order",
        )
    return stored

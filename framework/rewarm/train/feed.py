"""From the sampler's picks to the arrays of this data-parallel rank, read ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewarm.data.conditioning import Conditioning, read_with_prefix
from rewarm.data.domain import Domain
from rewarm.engine.base import Batch
from rewarm.mixing.draws import rank_slice, sample_hash
from rewarm.mixing.objective import Objective
from rewarm.mixing.sampler import Draw, Sampler
from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import align

PREFETCH_STEPS = 2
"""Steps drawn ahead of the one that trains; new weights take effect after them, whatever the disk's speed."""


@dataclass(frozen=True, slots=True)
class FedStep:
    """What one step trains on."""

    draw: Draw
    """The whole global batch."""
    batch: Batch
    """This rank's slice of it."""
    weights: np.ndarray
    """int64 [K]; the integer weights in effect at its first sample."""
    objective: np.ndarray | None
    """float64 [K]; shares of the objective at its first sample, None where they are those of the samples."""
    sample_hash: str


@dataclass(frozen=True, slots=True)
class _Pending:
    draw: Draw
    weights: np.ndarray
    state: dict[str, Any]
    batch: Future[Batch]


class Feed:
    """Draws on the calling thread, in step order; only the reading happens beside it.

    Args:
        sampler: positioned at the first sample of the next step.
        domains: in the sampler's order.
        global_batch_size: windows per step.
        total_samples: of the stage; nothing beyond them is drawn, so that a domain may be used up exactly.
        rank: which slice is read.
        num_ranks: data-parallel ranks.
        vocab_size: token ids at or above it are refused.
        objective: what the samples count in the loss; by default each counts once.
        conditioning: prefixes of the domains' documents, up to a sample at which a step begins.
    """

    def __init__(
        self,
        sampler: Sampler,
        domains: Sequence[Domain],
        *,
        global_batch_size: int,
        total_samples: int,
        rank: int,
        num_ranks: int,
        vocab_size: int,
        objective: Objective | None = None,
        conditioning: Conditioning | None = None,
    ) -> None:
        self._sampler = sampler
        self._objective = objective or Objective(sampler.names)
        self._conditioning = conditioning or Conditioning({}, 0)
        self._domains = list(domains)
        self._names = [domain.name for domain in domains]
        self._size, self._rank, self._num_ranks = global_batch_size, rank, num_ranks
        self._vocab_size, self._total_samples = vocab_size, total_samples
        self._ahead: deque[_Pending] = deque()
        self._scheduled: dict[int, np.ndarray] = {}
        self._state = sampler.state_dict()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")

    def next(self) -> FedStep:
        """The next step's batch."""
        while len(self._ahead) <= PREFETCH_STEPS and self._sampler.sample_index < self._total_samples:
            self._draw_ahead()
        pending = self._ahead.popleft()
        batch = pending.batch.result()
        self._state = pending.state
        objective = self._objective.shares(pending.draw.start)
        return FedStep(pending.draw, batch, pending.weights, objective, sample_hash(self._names, pending.draw))

    def peek(self) -> Batch:
        """The batch that :meth:`next` will return, left in place."""
        if not self._ahead:
            self._draw_ahead()
        return self._ahead[0].batch.result()

    @property
    def first_free_sample(self) -> int:
        """Global index of the first sample that no prefetch can have drawn when the current step is done: where new
        weights may take effect. It depends on the step alone, not on how far reading got."""
        return self._state["sample_index"] + (PREFETCH_STEPS + 1) * self._size

    @property
    def sampler(self) -> Sampler:
        """What draws the samples; it is ahead of the step that trains."""
        return self._sampler

    def schedule(self, entry: WeightEntry) -> None:
        """Let an entry of the weight log take effect, at a sample from :attr:`first_free_sample` on."""
        weights = align(entry.weights, self._names)
        self._sampler.schedule_weights(weights, entry.sample)
        self._scheduled[entry.sample] = weights
        self._objective.schedule(entry)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state after the last step that :meth:`next` returned, with every change scheduled since."""
        index = self._state["sample_index"]
        self._scheduled = {sample: weights for sample, weights in self._scheduled.items() if sample > index}
        pending = {change["sample"]: change["weights"] for change in self._state["pending"]}
        for sample, weights in self._scheduled.items():
            pending[sample] = dict(zip(self._names, weights.tolist(), strict=True))
        changes = [{"sample": sample, "weights": pending[sample]} for sample in sorted(pending)]
        return {**self._state, "pending": changes, "objective": self._objective.state_dict(index)}

    def cursors(self) -> dict[str, int]:
        """Windows drawn of each domain up to the last step that :meth:`next` returned."""
        return {domain["name"]: domain["cursor"] for domain in self._state["domains"]}

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _draw_ahead(self) -> None:
        weights = self._sampler.weights
        draw = self._sampler.draw(self._size)
        mine = rank_slice(draw, self._rank, self._num_ranks)
        factors = self._objective.factors(mine.start, mine.domains)
        batch = self._reader.submit(self._read, mine, factors)
        self._ahead.append(_Pending(draw, weights, self._sampler.state_dict(), batch))

    def _read(self, draw: Draw, factors: np.ndarray | None) -> Batch:
        # Decided by the global batch: every rank has a mask, or none has.
        conditioned = draw.start < self._conditioning.stop
        tokens: np.ndarray | None = None
        mask: np.ndarray | None = None
        for index in np.unique(draw.domains):
            domain = self._domains[index]
            rows = np.flatnonzero(draw.domains == index)
            prefix = self._conditioning.prefixes.get(domain.name) if conditioned else None
            if prefix is None:
                windows, learned = domain.train.read(draw.windows[rows]), None
            else:
                windows, learned = read_with_prefix(domain.train, draw.windows[rows], prefix)
            domain.check_token_ids(windows, self._vocab_size, "train")
            if tokens is None:
                tokens = np.empty((len(draw.domains), windows.shape[1]), dtype=np.int64)
                mask = np.ones((len(tokens), windows.shape[1] - 1), dtype=bool) if conditioned else None
            tokens[rows] = windows
            if mask is not None and learned is not None:
                mask[rows] = learned
        assert tokens is not None, "a slice is never empty"
        return Batch(tokens=tokens, domains=draw.domains, loss_mask=mask, loss_weights=factors)

"""Collectives without a model, and sums by domain, for the DeepSpeed engine. Megatron's engine needs groups of its own
model-parallel ranks and calls :mod:`rewarm.engine.ranks` itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rewarm.engine import device, ranks
from rewarm.engine.base import Batch


class Collectives:
    """The methods of :class:`~rewarm.engine.base.Engine` that need no model. A mix-in, named before ``Engine``."""

    def any_rank(self, flag: bool) -> bool:
        """See :meth:`~rewarm.engine.base.Engine.any_rank`."""
        return ranks.any_rank(flag)

    def barrier(self) -> None:
        """See :meth:`~rewarm.engine.base.Engine.barrier`."""
        dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """See :meth:`~rewarm.engine.base.Engine.broadcast`."""
        return ranks.broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        """See :meth:`~rewarm.engine.base.Engine.gather`."""
        return ranks.gather(value)


def sum_array(values: np.ndarray) -> np.ndarray:
    """Sum of an array over all ranks, in float64. Collective."""
    if dist.get_world_size() == 1:
        return values.astype(np.float64)
    local = torch.from_numpy(values).to(device.local_device(), torch.float64)
    return ranks.sum_over_ranks(local).cpu().numpy()


def sum_by_domain(windows: np.ndarray, domains: np.ndarray, num_domains: int, *, reports: bool) -> np.ndarray:
    """Values of windows summed per domain over all ranks. Collective.

    Args:
        windows: [B]; a value of each window of this rank.
        domains: int64 [B].
        num_domains: length of the result.
        reports: True on the one rank of each model copy that speaks for it.

    Returns:
        float64 [D], equal on every rank.
    """
    sums = np.bincount(domains, weights=windows, minlength=num_domains) if reports else np.zeros(num_domains)
    return sum_array(sums)


def tokens_per_window(batch: Batch) -> np.ndarray:
    """int64 [B]; targets that count, per window."""
    if batch.loss_mask is not None:
        return batch.loss_mask.sum(axis=1)
    return np.full(len(batch.tokens), batch.tokens.shape[1] - 1)


def evaluation_spans(num_windows: int, micro_batch_size: int, rank: int, size: int) -> list[np.ndarray]:
    """Window indices of the micro-batches that a data-parallel rank evaluates: number i goes to rank ``i % size``."""
    starts = range(rank * micro_batch_size, num_windows, size * micro_batch_size)
    return [np.arange(start, min(start + micro_batch_size, num_windows)) for start in starts]

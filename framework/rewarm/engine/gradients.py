"""Gradients of several domains at the weights of the moment, compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rewarm.engine import device, ranks
from rewarm.engine.base import Batch, GradientStatistics


def gradient_statistics(
    gradient: Callable[[Batch], Tensor],
    tokens: Sequence[np.ndarray],
    chunk_size: int,
    *,
    micro_batch_size: int,
    share: int,
    num_shares: int,
) -> GradientStatistics:
    """See :meth:`rewarm.engine.base.Engine.domain_gradients`. Collective.

    Args:
        gradient: from this rank's slice of a batch to its own part of the gradient of the batch's mean token loss,
            fp32 [n]; over all ranks the parts cover the model once. Collective.
        tokens: int64 [B, S + 1] of each domain.
        chunk_size: windows of one pass.
        micro_batch_size: that a slice's length is a multiple of.
        share: which slice is this rank's.
        num_shares: slices of a pass.
    """
    means: list[Tensor] = []
    squares = torch.zeros(len(tokens), dtype=torch.float64, device=device.local_device())
    passes = [np.array_split(windows, max(2, len(windows) // chunk_size)) for windows in tokens]
    for domain, chunks in enumerate(passes):
        assert len(tokens[domain]) >= 2, "one window has no variance"
        mean: Tensor | None = None
        for chunk in chunks:
            found = gradient(slice_of(chunk, domain, micro_batch_size, share, num_shares))
            squares[domain] += len(chunk) * _product(found, found)
            weighted = found * (len(chunk) / len(tokens[domain]))
            mean = weighted if mean is None else mean.add_(weighted)
        assert mean is not None
        means.append(mean)
    products = torch.stack([torch.stack([_product(one, other) for other in means]) for one in means])
    total = ranks.sum_over_ranks(torch.cat([products, squares[None]])).cpu().numpy()
    products_of, counts = total[:-1], np.array([len(windows) for windows in tokens])
    # E sum n_j |g_j - mean|^2 = (passes - 1) * trace, for passes of n_j windows.
    spread = total[-1] - counts * np.diag(products_of)
    return GradientStatistics(products_of, np.maximum(spread, 0) / (np.array([len(p) for p in passes]) - 1))


def slice_of(windows: np.ndarray, domain: int, micro_batch_size: int, share: int, num_shares: int) -> Batch:
    """A rank's slice of some windows; all slices have one length, and what fills them up does not count.

    Returns:
        A batch with a mask.
    """
    step = micro_batch_size * num_shares
    length = -(-len(windows) // step) * step // num_shares
    mine = np.arange(share * length, (share + 1) * length)
    counted = np.repeat((mine < len(windows))[:, None], windows.shape[1] - 1, axis=1)
    rows = windows[np.minimum(mine, len(windows) - 1)]
    return Batch(rows, np.full(length, domain, dtype=np.int64), counted)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of fp32 [n] in float64, without a float64 copy of the whole of either."""
    size = 1 << 20
    parts = [a.double() @ b.double() for a, b in zip(one.split(size), other.split(size), strict=True)]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=one.device)

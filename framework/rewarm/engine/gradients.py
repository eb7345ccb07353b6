"""Gradients of several domains at the weights of the moment, compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rewarm.engine import device, ranks
from rewarm.engine.base import Batch, GradientStatistics
from rewarm.errors import ensure

_BLOCK = 1 << 22
"""Elements that are made float64 at a time."""


def gradient_statistics(
    gradient: Callable[[Batch], Tensor],
    tokens: Sequence[np.ndarray],
    chunk_size: int,
    *,
    micro_batch_size: int,
    share: int,
    num_shares: int,
    stages: int = 1,
) -> GradientStatistics:
    """See :meth:`rewarm.engine.base.Engine.domain_gradients`. Collective.

    Args:
        gradient: from this rank's slice of a batch to its own part of the gradient of the batch's mean token loss,
            fp32 [n], a copy; over all ranks the parts cover the model once. Collective.
        tokens: int64 [B, S + 1] of each domain.
        chunk_size: windows of one pass.
        micro_batch_size: most windows of a forward pass.
        share: which slice is this rank's.
        num_shares: slices of a pass.
        stages: that the number of a slice's micro-batches is a multiple of.
    """
    means: list[Tensor] = []
    squares = torch.zeros(len(tokens), dtype=torch.float64, device=device.local_device())
    passes = [np.array_split(windows, max(2, len(windows) // chunk_size)) for windows in tokens]
    for domain, chunks in enumerate(passes):
        ensure(len(tokens[domain]) >= 2, "one window has no variance")
        mean: Tensor | None = None
        for chunk in chunks:
            found = gradient(slice_of(chunk, domain, micro_batch_size, share, num_shares, stages))
            squares[domain] += len(chunk) * _products([found])[0, 0]
            part = len(chunk) / len(tokens[domain])
            mean = found.mul_(part) if mean is None else mean.add_(found, alpha=part)
        assert mean is not None
        means.append(mean.cpu())  # a device has no room for one more of them each domain
    total = ranks.sum_over_ranks(torch.cat([_products(means), squares[None]])).cpu().numpy()
    products, counts = total[:-1], np.array([len(windows) for windows in tokens])
    # E sum n_j |g_j - mean|^2 = (passes - 1) * trace, for passes of n_j windows.
    spread = total[-1] - counts * np.diag(products)
    variances = np.maximum(spread, 0) / (np.array([len(p) for p in passes]) - 1)
    # E |mean|^2 = |E mean|^2 + trace / n.
    return GradientStatistics(products, np.diag(products) - variances / counts, variances)


def slice_of(
    windows: np.ndarray, domain: int, micro_batch_size: int, share: int, num_shares: int, stages: int = 1
) -> Batch:
    """A rank's slice of some windows; all slices have one length, and what fills them up does not count.

    The slice is as short as can be cut into equal micro-batches of at most ``micro_batch_size`` windows, whose number
    is a multiple of ``stages``: few windows are not filled up to a batch that training would take.

    Returns:
        A batch with a mask.
    """
    size = min(micro_batch_size, -(-len(windows) // (num_shares * stages)))
    step = size * stages * num_shares
    length = -(-len(windows) // step) * step // num_shares
    mine = np.arange(share * length, (share + 1) * length)
    counted = np.repeat((mine < len(windows))[:, None], windows.shape[1] - 1, axis=1)
    rows = windows[np.minimum(mine, len(windows) - 1)]
    return Batch(rows, np.full(length, domain, dtype=np.int64), counted)


def _products(vectors: Sequence[Tensor]) -> Tensor:
    """Inner products of K fp32 [n] in float64 [K, K] on this rank's device, without a float64 copy, or one there, of
    the whole of any."""
    place = device.local_device()
    found = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=place)
    for parts in zip(*(vector.split(max(1, _BLOCK // len(vectors))) for vector in vectors), strict=True):
        block = torch.stack(parts).to(place).double()
        found += block @ block.T
    return found

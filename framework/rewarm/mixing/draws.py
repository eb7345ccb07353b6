"""The samples of a step: which rank reads which, and a hash that proves two runs saw the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Draw:
    """Consecutive samples of the global order."""

    start: int
    """Global sample index of the first."""
    domains: np.ndarray
    """int64 [n]; index of each sample's domain."""
    windows: np.ndarray
    """int64 [n]; index of each sample's window in the domain's storage order."""

    def __len__(self) -> int:
        return len(self.domains)


def rank_slice(draw: Draw, rank: int, size: int) -> Draw:
    """The contiguous block of a global batch that one data-parallel rank reads.

    The blocks of all ranks are disjoint and their union is the batch; when ``size`` does not divide the batch, their
    lengths differ by at most one.
    """
    assert 0 <= rank < size, f"rank {rank} of {size}"
    first, last = len(draw) * rank // size, len(draw) * (rank + 1) // size
    return Draw(draw.start + first, draw.domains[first:last], draw.windows[first:last])


def sample_hash(names: Sequence[str], draw: Draw) -> str:
    """Hash of the ordered list of (domain name, window), equal on every platform.

    Args:
        names: the domains' names, in the order that ``draw.domains`` indexes.

    Returns:
        32 hexadecimal digits (BLAKE2b of a little-endian table). The sample index is not part of it.
    """
    identities = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    by_domain = np.frombuffer(b"".join(identities), dtype="<u8")
    table = np.empty((len(draw), 2), dtype="<u8")
    table[:, 0] = by_domain[draw.domains]
    table[:, 1] = draw.windows
    return hashlib.blake2b(table.tobytes(), digest_size=16).hexdigest()

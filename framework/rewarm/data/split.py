"""Which documents are kept, and on which side of the split: by the hash of their text alone."""

from __future__ import annotations

import hashlib

import numpy as np

HASH_BYTES = 16


def text_hash(encoded: bytes) -> bytes:
    """The identity of a document: 16 bytes of BLAKE2b over its UTF-8 text."""
    return hashlib.blake2b(encoded, digest_size=HASH_BYTES).digest()


def first_occurrences(hashes: np.ndarray) -> np.ndarray:
    """Mark the first document of every group of equal ones.

    Args:
        hashes: uint64 [N, 2], in input order.

    Returns:
        bool [N].
    """
    keep = np.ones(len(hashes), dtype=bool)
    # lexsort is stable: within a group of equals the earliest document comes first.
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    keep[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return keep


def is_held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Mark the held-out documents: those whose hash falls into the lowest share.

    Equal texts fall on the same side, and a document's side never changes when others are added or removed.

    Args:
        hashes: uint64 [N, 2].
        fraction: expected share of the documents, in [0, 1).

    Returns:
        bool [N].
    """
    return np.asarray(hashes[:, 0] < np.uint64(int(fraction * 2**64)))

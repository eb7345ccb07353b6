"""Which documents are kept, and on which side of the split: by the hash of their text alone."""

from __future__ import annotations

import hashlib
from typing import Literal, assert_never

import numpy as np

HASH_BYTES = 16
HeldOutBy = Literal["documents", "tokens"]


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


def held_out_mask(hashes: np.ndarray, lengths: np.ndarray, fraction: float, by: HeldOutBy) -> np.ndarray:
    """Mark the held-out documents.

    By documents it is :func:`is_held_out`: a document keeps its side whatever is added, and the share is right on
    average only. By tokens documents are taken in the order of their hashes until they hold the share of the tokens,
    to the nearest whole document; one that is longer than the share is passed over. A document's side then depends on
    the others.

    Args:
        hashes: uint64 [N, 2].
        lengths: int [N]; tokens of each document, 0 for one that is dropped anyway.
        fraction: share of the documents or of the tokens, in [0, 1).
        by: which.

    Returns:
        bool [N].
    """
    if by == "documents":
        return is_held_out(hashes, fraction)
    if by == "tokens":
        return _held_out_by_tokens(hashes, lengths, fraction)
    assert_never(by)


def _held_out_by_tokens(hashes: np.ndarray, lengths: np.ndarray, fraction: float) -> np.ndarray:
    wanted = fraction * float(lengths.sum(dtype=np.int64))
    candidates = np.flatnonzero((lengths > 0) & (lengths <= wanted))
    order = candidates[np.lexsort((hashes[candidates, 1], hashes[candidates, 0]))]
    ends = np.cumsum(lengths[order], dtype=np.int64)
    # A document counts if at least half of it lies below the share.
    chosen = order[ends - lengths[order] / 2 <= wanted]
    mask = np.zeros(len(hashes), bool)
    mask[chosen] = True
    return mask

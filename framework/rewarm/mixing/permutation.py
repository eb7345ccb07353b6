"""Random order without an index: a keyed bijection of ``range(n)`` that is computed where it is asked.

A Feistel network over the smallest power of two that holds ``n``, with cycle walking for the values beyond ``n``
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The network alternates between a left and a right
part whose widths differ by at most one bit, so fewer than two evaluations are needed per value on average.
"""

from __future__ import annotations

import hashlib

import numpy as np

from rewarm.errors import ensure

ORDER_VERSION = 1
"""Version of everything that decides the order of samples; it is part of every fingerprint, so that a changed
algorithm is refused by old checkpoints and never reorders them silently."""

ROUNDS = 8
MAX_SIZE = 2**63
_MULTIPLIER_1 = np.uint64(0xFF51AFD7ED558CCD)
_MULTIPLIER_2 = np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(32)


def order_key(seed: int, fingerprint: str, epoch: int) -> bytes:
    """The key of one domain's order in one epoch.

    The domain enters by the fingerprint of its content, so a renamed domain keeps its order.

    Returns:
        16 bytes.
    """
    text = f"rewarm-order-{ORDER_VERSION}\0{seed}\0{fingerprint}\0{epoch}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def round_keys(key: bytes) -> np.ndarray:
    """The Feistel network's round keys, uint64 [ROUNDS], from a key of any length."""
    digest = hashlib.blake2b(key, digest_size=8 * ROUNDS, person=b"rewarm-feistel").digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


class KeyedPermutation:
    """A bijection of ``range(size)`` chosen by a key, with random access and no memory.

    Args:
        size: number of values, 1 to 2^63.
        key: what chooses the permutation.
    """

    def __init__(self, size: int, key: bytes) -> None:
        ensure(1 <= size <= MAX_SIZE, f"a permutation of {size} values")
        self.size = size
        self._round_keys = round_keys(key)
        bits = max(2, (size - 1).bit_length())
        self._right_bits = np.uint64(bits // 2)
        self._left_mask = np.uint64(2 ** (bits - bits // 2) - 1)
        self._right_mask = np.uint64(2 ** (bits // 2) - 1)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Where each position is sent.

        Args:
            positions: int64 [n], each in ``range(size)``.

        Returns:
            int64 [n], each in ``range(size)``; different positions give different values.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions):
            ensure(positions.min() >= 0 and positions.max() < self.size, "position outside the permutation")
        values = self._network(positions.astype(np.uint64))
        limit = np.uint64(self.size)
        outside = np.flatnonzero(values >= limit)
        while len(outside):
            walked = self._network(values[outside])
            values[outside] = walked
            outside = outside[walked >= limit]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._right_bits, values & self._right_mask
        for index in range(0, ROUNDS, 2):
            left = left ^ (_mix(right, self._round_keys[index]) & self._left_mask)
            right = right ^ (_mix(left, self._round_keys[index + 1]) & self._right_mask)
        return (left << self._right_bits) | right


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A keyed 64-bit hash whose high half is returned; constants are those of MurmurHash3's finaliser."""
    mixed = (values ^ key) * _MULTIPLIER_1
    mixed = (mixed ^ (mixed >> _SHIFT)) * _MULTIPLIER_2
    return mixed >> _SHIFT

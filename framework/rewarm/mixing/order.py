"""From integer weights to (domain, window): the picks, and each domain's permuted epochs.

Two paths give identical results: numpy here, and ``csrc/cpu/sampler.cpp`` where the native library was built.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from rewarm.mixing.permutation import KeyedPermutation, order_key, round_keys
from rewarm.mixing.weights import TOTAL


def pick(weights: np.ndarray, credits: np.ndarray, n: int) -> np.ndarray:
    """Choose the domains of ``n`` consecutive samples.

    Per sample: every credit grows by its weight, the largest credit (lowest index on ties) is picked and pays 2^32.
    After a pick the credits sum to what they summed to before, a domain's count is less than 1 sample above its
    share, and at most ``1/2 + 1/3 + ... + 1/K`` below it, whatever the weights do: the m largest credits sum to at
    most ``m * (1/(m+1) + ... + 1/K)``, by induction over the samples.

    No rule that learns the weights as it goes does better. Weights that are spread equally over the domains that were
    not picked yet, whichever they are, leave the last one ``1/K + ... + 1/2`` short (the cup game of Dietz & Sleator
    1987). The bound below 1 of Tijdeman's "The chairman assignment problem", 1980, needs all the weights to come; to
    know the next L samples' weights is not enough, because L - 1 of them can go to one more domain.

    Args:
        weights: int64 [K] summing to 2^32.
        credits: int64 [K], changed in place.

    Returns:
        int64 [n]; index of each sample's domain.
    """
    picks = np.empty(n, dtype=np.int64)
    for index in range(n):
        credits += weights
        chosen = int(credits.argmax())
        credits[chosen] -= TOTAL
        picks[index] = chosen
    return picks


class WindowOrder:
    """The windows of every domain in the order they are drawn: epoch after epoch, each permuted by its own key.

    Args:
        sizes: windows of each domain, all positive.
        fingerprints: content of each domain.
        seed: seed of the run.
        library: the native library (:func:`rewarm.mixing.native.sampler_library`), or None for numpy.
    """

    def __init__(
        self, sizes: Sequence[int], fingerprints: Sequence[str], seed: int, *, library: ctypes.CDLL | None = None
    ) -> None:
        self._sizes = np.array(sizes, dtype=np.int64)
        self._fingerprints = list(fingerprints)
        self._seed = seed
        self._library = library
        self._permutations: dict[int, tuple[int, KeyedPermutation]] = {}
        self._key_epochs = np.full(len(self._sizes), -1, dtype=np.int64)
        self._keys = np.zeros((len(self._sizes), 8), dtype=np.uint64)

    def draw(
        self, weights: np.ndarray, credits: np.ndarray, cursors: np.ndarray, n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The next ``n`` samples.

        Args:
            weights: int64 [K] summing to 2^32.
            credits: int64 [K], changed in place.
            cursors: int64 [K], samples drawn so far from each domain; changed in place.

        Returns:
            Domains and windows, each int64 [n].
        """
        if self._library is not None:
            return self._draw_native(self._library, weights, credits, cursors, n)
        domains = pick(weights, credits, n)
        windows = np.empty(n, dtype=np.int64)
        for domain in np.unique(domains):
            places = np.flatnonzero(domains == domain)
            windows[places] = self.windows(int(domain), int(cursors[domain]), len(places))
            cursors[domain] += len(places)
        return domains, windows

    def windows(self, domain: int, cursor: int, n: int) -> np.ndarray:
        """Windows ``cursor`` to ``cursor + n`` of one domain's order, int64 [n]."""
        size = int(self._sizes[domain])
        windows = np.empty(n, dtype=np.int64)
        done = 0
        while done < n:
            epoch, offset = divmod(cursor + done, size)
            count = min(n - done, size - offset)
            positions = np.arange(offset, offset + count, dtype=np.int64)
            windows[done : done + count] = self._permutation(domain, epoch)(positions)
            done += count
        return windows

    def _permutation(self, domain: int, epoch: int) -> KeyedPermutation:
        cached = self._permutations.get(domain)
        if cached is None or cached[0] != epoch:
            key = order_key(self._seed, self._fingerprints[domain], epoch)
            cached = epoch, KeyedPermutation(int(self._sizes[domain]), key)
            self._permutations[domain] = cached
        return cached[1]

    def _draw_native(
        self, library: ctypes.CDLL, weights: np.ndarray, credits: np.ndarray, cursors: np.ndarray, n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        domains, windows = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
        weights = np.ascontiguousarray(weights, dtype=np.int64)
        done = 0
        while done < n:
            missing = ctypes.c_int64(-1)
            done += library.rewarm_sampler_draw(
                len(self._sizes), weights.ctypes.data, credits.ctypes.data, cursors.ctypes.data,
                self._sizes.ctypes.data, self._key_epochs.ctypes.data, self._keys.ctypes.data,
                n - done, domains[done:].ctypes.data, windows[done:].ctypes.data, ctypes.byref(missing),
            )  # fmt: skip
            if missing.value >= 0:
                self._renew_key(missing.value, int(cursors[missing.value] // self._sizes[missing.value]))
        return domains, windows

    def _renew_key(self, domain: int, epoch: int) -> None:
        self._key_epochs[domain] = epoch
        self._keys[domain] = round_keys(order_key(self._seed, self._fingerprints[domain], epoch))

"""From integer weights to (domain, window): the picks, and each domain's permuted epochs.

Two paths give identical results: numpy here, and ``csrc/cpu/sampler.cpp`` where the native library was built.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewarm.mixing.permutation import MAX_SIZE, KeyedPermutation, order_key, round_keys
from rewarm.mixing.weights import TOTAL

_CHUNK = 2**20
"""Windows that are permuted at once where they are only counted."""


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


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the order that a seed gives a domain, counted in windows over all epochs."""

    seed: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class DomainOrder:
    """The windows of one domain in the order they are drawn.

    Args:
        size: windows of the domain, positive.
        fingerprint: of its content.
        seed: of the run; each epoch is permuted by its own key.
        parts: stretches to draw one after the other, and again from the first when all were drawn; empty for all of
            the seed's own order, epoch after epoch.
    """

    def __init__(self, size: int, fingerprint: str, seed: int, parts: Sequence[Part] = ()) -> None:
        self.size, self.fingerprint, self.parts = size, fingerprint, tuple(parts)
        self._seed, self._length = seed, sum(map(len, parts))
        self._key: tuple[int, int] | None = None
        self._permutation: KeyedPermutation | None = None

    def windows(self, cursor: int, n: int) -> np.ndarray:
        """Windows ``cursor`` to ``cursor + n``, int64 [n]."""
        windows = np.empty(n, dtype=np.int64)
        done = 0
        while done < n:
            seed, place, left = self._place(cursor + done)
            epoch, offset = divmod(place, self.size)
            count = min(n - done, left, self.size - offset)
            positions = np.arange(offset, offset + count, dtype=np.int64)
            windows[done : done + count] = self._permuted(seed, epoch)(positions)
            done += count
        return windows

    def counts(self, cursor: int, n: int) -> np.ndarray:
        """How often each window is among ``cursor`` to ``cursor + n``, int32 [size]; whole epochs are not walked."""
        counts = np.zeros(self.size, dtype=np.int32)
        done = 0
        while done < n:
            _, place, left = self._place(cursor + done)
            offset, stretch = place % self.size, min(n - done, left)
            if offset == 0 and stretch >= self.size:
                counts += stretch // self.size
                done += stretch // self.size * self.size
                continue
            # Inside an epoch no window comes twice.
            stretch = min(stretch, self.size - offset, _CHUNK)
            counts[self.windows(cursor + done, stretch)] += 1
            done += stretch
        return counts

    def _place(self, cursor: int) -> tuple[int, int, int]:
        """Seed and place in its order where a cursor stands, and how many windows follow in that stretch."""
        if not self.parts:
            return self._seed, cursor, MAX_SIZE
        cursor %= self._length
        for part in self.parts:
            if cursor < len(part):
                return part.seed, part.start + cursor, len(part) - cursor
            cursor -= len(part)
        raise AssertionError("a cursor below the length is in a part")

    def _permuted(self, seed: int, epoch: int) -> KeyedPermutation:
        if self._permutation is None or self._key != (seed, epoch):
            self._key = seed, epoch
            self._permutation = KeyedPermutation(self.size, order_key(seed, self.fingerprint, epoch))
        return self._permutation


class WindowOrder:
    """Draws the windows of several domains.

    Args:
        sizes: windows of each domain, all positive.
        fingerprints: content of each domain.
        seed: seed of the run.
        library: the native library (:func:`rewarm.mixing.native.sampler_library`), or None for numpy.
        parts: of each domain, see :class:`DomainOrder`; None where no domain has any.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        fingerprints: Sequence[str],
        seed: int,
        *,
        library: ctypes.CDLL | None = None,
        parts: Sequence[Sequence[Part]] | None = None,
    ) -> None:
        parts = parts or [()] * len(sizes)
        self._orders = [DomainOrder(*each[:2], seed, each[2]) for each in zip(sizes, fingerprints, parts, strict=True)]
        self._sizes = np.array(sizes, dtype=np.int64)
        self._seed = seed
        self._library = library
        self._key_epochs = np.full(len(self._sizes), -1, dtype=np.int64)
        self._keys = np.zeros((len(self._sizes), 8), dtype=np.uint64)

    def draw(
        self, weights: np.ndarray, credits: np.ndarray, cursors: np.ndarray, n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The next ``n`` samples.

        Args:
            weights: int64 [K] summing to 2^32.
            credits: int64 [K], changed in place.
            cursors: int64 [K], place of each domain in its order; changed in place.

        Returns:
            Domains and windows, each int64 [n].
        """
        before = cursors.copy()
        if self._library is not None:
            domains, windows = self._draw_native(self._library, weights, credits, cursors, n)
            fill = [index for index, order in enumerate(self._orders) if order.parts]
        else:
            domains = pick(weights, credits, n)
            windows = np.empty(n, dtype=np.int64)
            cursors += np.bincount(domains, minlength=len(cursors))
            fill = list(range(len(self._orders)))
        for domain in fill:
            places = np.flatnonzero(domains == domain)
            windows[places] = self._orders[domain].windows(int(before[domain]), len(places))
        return domains, windows

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
        self._keys[domain] = round_keys(order_key(self._seed, self._orders[domain].fingerprint, epoch))

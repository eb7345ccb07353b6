"""Windows of a token stream: the unit that is sampled."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rewarm.data.indexed import IndexedTokens
from rewarm.errors import ensure


class WindowReader:
    """Random access to the windows of a Megatron ``.bin/.idx`` pair, or of a range of its tokens.

    Window i holds tokens ``[start + i * S, start + (i + 1) * S]``, both ends included: adjacent windows share one
    token, so that every token of the range but the first, and but a tail shorter than S, is a target exactly once.
    Documents are not kept apart: the stream is cut where the length falls.

    Opening costs the same for any size: the token count comes from the size of the file, and no index of windows is
    built. The reader pickles as its arguments and maps the file anew.

    Args:
        prefix: path of the pair without suffix, or a pair that is already open.
        sequence_length: S, targets in a window.
        start: first token of the range.
        stop: end of the range; None means the end of the stream.

    Raises:
        UserError: if the pair is missing, damaged or cut short.
    """

    def __init__(
        self, prefix: str | Path | IndexedTokens, sequence_length: int, start: int = 0, stop: int | None = None
    ) -> None:
        source = prefix if isinstance(prefix, IndexedTokens) else IndexedTokens(prefix)
        self.source = source
        self.sequence_length = sequence_length
        self.start = start
        self.stop = source.num_tokens if stop is None else stop
        ensure(
            sequence_length >= 1 and 0 <= self.start <= self.stop <= source.num_tokens,
            "a range outside of the tokens, or windows without tokens",
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the range."""
        return self.stop - self.start

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.sequence_length

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Copy windows out of the file.

        Args:
            indices: int [B], each in ``[0, len(self))``; any order, repeats allowed.

        Returns:
            int64 [B, S + 1].

        Raises:
            IndexError: if a window does not exist.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(
                f"windows {wanted.min()}..{wanted.max()} asked of {self.source.prefix}: it has {len(self)}"
            )
        tokens, length = self.source.tokens, self.sequence_length
        windows = np.empty((wanted.size, length + 1), dtype=np.int64)
        for row, window in enumerate(wanted.tolist()):
            first = self.start + window * length
            windows[row] = tokens[first : first + length + 1]
        return windows

    def document_starts(self, window: int) -> list[int]:
        """Places inside a window, above 0 and up to S, at which a document begins; found by binary search in the
        file."""
        first = self.start + window * self.sequence_length
        places: list[int] = []
        document = self.source.last_document_at_or_before(first) + 1
        while document < self.source.num_documents:
            place = self.source.document_start(document) - first
            if place > self.sequence_length:
                break
            if place > 0 and place not in places[-1:]:  # an empty document begins where the next one does
                places.append(place)
            document += 1
        return places

    def __reduce__(self) -> tuple[type[WindowReader], tuple[str, int, int, int]]:
        return WindowReader, (self.source.prefix, self.sequence_length, self.start, self.stop)

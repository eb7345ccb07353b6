"""Held-out loss of one domain, the same number on every layout wherever kernels allow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rewarm.data.domain import Domain
from rewarm.mixing.permutation import KeyedPermutation

if TYPE_CHECKING:
    from rewarm.data.windows import WindowReader
    from rewarm.engine.base import Engine


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Loss of a model on a domain's held-out windows."""

    total: float
    """Token losses in nats, summed."""
    num_tokens: int
    bytes_per_token: float | None
    """Bytes of text behind a token; None where no tokenizer is known."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.total / self.num_tokens


def held_out_windows(reader: WindowReader, limit: int) -> np.ndarray:
    """The windows that are always evaluated: at most ``limit``, evenly spread over the split.

    Returns:
        int64 [B, sequence_length + 1]
    """
    total = len(reader)
    count = min(limit, total)
    return reader.read(np.arange(count, dtype=np.int64) * total // count)


def rotated_windows(reader: WindowReader, count: int, turn: int, key: bytes) -> np.ndarray:
    """A few held-out windows, others at every turn: over many turns each window of the split comes equally often.

    Args:
        reader: the split.
        count: windows of a turn; all of them when the split has fewer.
        turn: 0, 1, 2, ...
        key: chooses the order in which they come, which has nothing to do with their places in the files.

    Returns:
        int64 [min(count, windows of the split), sequence_length + 1], no window twice; a function of the arguments.
    """
    total = len(reader)
    count = min(count, total)
    positions = (np.arange(count, dtype=np.int64) + turn * count) % total
    return reader.read(KeyedPermutation(total, key)(positions))


def summarise(domain: Domain, window_sums: np.ndarray, tokens_per_window: int) -> HeldOutLoss:
    """Add up window losses exactly, so that the order of the additions does not matter.

    Args:
        domain: gives the bytes that a token stands for.
        window_sums: float64 [B]; nats per window.
        tokens_per_window: targets in a window.
    """
    total = math.fsum(window_sums.tolist())
    return HeldOutLoss(total, len(window_sums) * tokens_per_window, domain.held_out_bytes_per_token)


def evaluate_domain(engine: Engine, domain: Domain, limit: int, micro_batch_size: int, vocab_size: int) -> HeldOutLoss:
    """Evaluate the model on a domain. Collective.

    Args:
        engine: holds the model.
        domain: its held-out split is read.
        limit: most windows.
        micro_batch_size: windows per forward pass.
        vocab_size: rows of the model; token ids at or above it are refused.
    """
    tokens = held_out_windows(domain.held_out, limit)
    domain.check_token_ids(tokens, vocab_size, "held-out")
    return summarise(domain, engine.evaluate(tokens, micro_batch_size), tokens.shape[1] - 1)

"""Token losses over a vocabulary that is split over tensor ranks and padded."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


class _ExcludePadding(torch.autograd.Function):
    """Sets the padded columns to minus infinity, in place: they drop out of the softmax exactly, and their gradient,
    a softmax of zero times a finite number, is zero without further work."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: int) -> Tensor:
        ctx.mark_dirty(logits)
        logits[..., columns:] = float("-inf")
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def exclude_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Remove the columns beyond ``vocab_size`` from every softmax over ``logits``, which is overwritten.

    Args:
        logits: [..., padded vocabulary / tensor ranks], this tensor rank's columns.
        vocab_size: columns of the whole vocabulary without padding.
    """
    width = logits.shape[-1]
    columns = vocab_size - parallel_state.get_tensor_model_parallel_rank() * width
    return logits if columns >= width else _ExcludePadding.apply(logits, max(0, columns))


_BLOCK = 1 << 24
"""Scores that are fp32 at a time where the logits are not: 64 MiB."""


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy that turns fp32 logits into log-probabilities, and logits into gradients, in place.

    The logits are the largest tensor of a step; torch's own operators would make two more of their size. Of 16-bit
    logits a part at a time is made fp32, and again in the backward pass: an fp32 copy would take twice their memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        for rows in _blocks(logits):
            scores = _log_probabilities(logits[rows])
            losses[rows] = scores.gather(-1, targets[rows, None]).squeeze(-1).neg_()
        ctx.save_for_backward(logits, targets)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        for rows in _blocks(logits):
            part, index = logits[rows], targets[rows, None]
            scores = part if part.dtype == torch.float32 else _log_probabilities(part)
            scores.exp_().scatter_add_(-1, index, scores.new_full((len(scores), 1), -1.0))
            part.copy_(scores.mul_(gradients[0][rows, None]))
        return logits, None


def _blocks(logits: Tensor) -> list[slice]:
    """Rows that are treated at once: all of fp32 logits, which need no memory of their own."""
    count = len(logits) if logits.dtype == torch.float32 else max(1, _BLOCK // logits.shape[-1])
    return [slice(first, first + count) for first in range(0, len(logits), max(1, count))]


def _log_probabilities(logits: Tensor) -> Tensor:
    """Logarithm of the softmax of each row in fp32; it takes the place of fp32 logits."""
    scores = logits.float()
    torch.ops.aten._log_softmax.out(scores, -1, False, out=scores)
    return scores


def token_losses(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Cross entropy of each token in nats, in fp32.

    Args:
        logits: [S, B, padded vocabulary / tensor ranks]; overwritten.
        labels: int64 [B, S].
        vocab_size: columns of the whole vocabulary without padding.

    Returns:
        fp32 [S, B], equal on the tensor ranks.
    """
    targets = labels.t().contiguous()
    logits = exclude_padding(logits, vocab_size)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        return vocab_parallel_cross_entropy(logits, targets)
    return _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten()).view(targets.shape)

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


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy that turns the logits into log-probabilities and those into gradients, in place.

    The logits are the largest tensor of a step; torch's own operators would make two more of their size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        scores = logits.float()
        torch.ops.aten._log_softmax.out(scores, -1, False, out=scores)
        ctx.save_for_backward(scores, targets)
        ctx.dtype = logits.dtype
        return scores.gather(-1, targets[:, None]).squeeze(-1).neg_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        scores, targets = ctx.saved_tensors
        result = scores.exp_()
        result.scatter_add_(-1, targets[:, None], result.new_full((len(targets), 1), -1.0))
        return result.mul_(gradients[0][:, None]).to(ctx.dtype), None


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

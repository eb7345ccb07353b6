"""The gated activation (Shazeer, 2020, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, with both gradients written side by side where the projection's backward reads them."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        gate, up = projected.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        gate, up = projected.chunk(2, dim=-1)
        result = torch.empty_like(projected)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        torch.mul(gradients[0], silu(gate), out=up_gradient)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=gate_gradient)
        return result


class SwiGLU:
    """The activation between the two projections of the feed-forward block.

    No ``nn.Module``: it has no state, and Megatron-Core asks every module of the block for its shards.
    """

    def __init__(self, config: Any) -> None:
        pass

    def __call__(self, projected: Tensor) -> Tensor:
        """Args: projected [..., 2 * F], gate before up. Returns: [..., F]."""
        return _SwiGLU.apply(projected)

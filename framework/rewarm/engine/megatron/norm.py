"""Root-mean-square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from rewarm.errors import ensure


class _RMSNorm(torch.autograd.Function):
    """The norm and its gradient by hand: half the passes over memory of torch's composite operators on a CPU.

    With x' = x / rms(x) and y = x' * w: dw = sum(dy * x'), dx = (dy * w - x' * mean(dy * w * x')) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = hidden.float()
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (x * scale).to(hidden.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        normalised = hidden.float() * scale
        gradient = gradients[0].float()
        product = gradient * normalised
        weight_gradient = product.flatten(0, -2).sum(0)
        mean = product.mul_(weight).mean(dim=-1, keepdim=True)
        hidden_gradient = (gradient * weight).addcmul_(normalised, mean, value=-1).mul_(scale)
        return hidden_gradient.to(hidden.dtype), weight_gradient.to(weight.dtype), None


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * hidden / sqrt(mean(hidden^2) + eps)`` over the last dimension.

    The division is done in fp32 and the product with the weight in the dtype of ``hidden``, as Hugging Face does.
    """
    if not hidden.is_cuda:
        return _RMSNorm.apply(hidden, weight, eps)
    if hidden.dtype == torch.float32:
        return nn.functional.rms_norm(hidden, weight.shape, weight, eps)
    return nn.functional.rms_norm(hidden.float(), weight.shape, None, eps).to(hidden.dtype) * weight


class RMSNorm(nn.Module):
    """:func:`rms_norm` with a weight.

    Unlike Megatron-Core's wrapper of torch's norm it may run under sequence parallelism: its weight is marked, so
    that the partial gradients of the ranks are summed.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        place = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=place))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Args: hidden [..., hidden_size]. Returns: the same shape and dtype."""
        return rms_norm(hidden, self.weight, self.eps)


class _WidthNorm(torch.autograd.Function):
    """The norm over channels that tensor ranks share: each holds some, and all sum what they know of the rest.

    As :class:`_RMSNorm`, with both means over the ranks of the group: that of the squares in the forward pass and
    that of dy * w * x' in the backward pass, [..., 1] each.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, group: dist.ProcessGroup) -> Tensor:
        x = hidden.float()
        width = x.shape[-1] * dist.get_world_size(group)
        squares = x.square().sum(dim=-1, keepdim=True)
        dist.all_reduce(squares, group=group)
        scale = squares.div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        ctx.group, ctx.width = group, width
        return (x * scale).to(hidden.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, scale = ctx.saved_tensors
        normalised = hidden.float() * scale
        gradient = gradients[0].float()
        product = gradient * normalised
        weight_gradient = product.flatten(0, -2).sum(0)
        mean = product.mul_(weight).sum(dim=-1, keepdim=True)
        dist.all_reduce(mean, group=ctx.group)
        mean.div_(ctx.width)
        hidden_gradient = (gradient * weight).addcmul_(normalised, mean, value=-1).mul_(scale)
        return hidden_gradient.to(hidden.dtype), weight_gradient.to(weight.dtype), None, None


class WidthNorm(RMSNorm):
    """RMSNorm of queries or keys over all heads together, of which this tensor rank holds some (OLMo 2).

    Every rank keeps the whole weight and applies its part; Megatron-Core sums the gradients of what is called
    ``q_layernorm`` or ``k_layernorm`` over the tensor ranks.

    Args:
        config: of the decoder.
        hidden_size: width of one head.
        eps: added to the mean square.
        num_heads: of the whole model.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, *, num_heads: int) -> None:
        super().__init__(config, num_heads * hidden_size, eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """Args: hidden [S, B, heads of this rank, head_dim]. Returns: the same shape and dtype."""
        flat, group = hidden.flatten(-2), parallel_state.get_tensor_model_parallel_group()
        if dist.get_world_size(group) == 1:
            return rms_norm(flat, self.weight, self.eps).view(hidden.shape)
        weight = self.weight.chunk(dist.get_world_size(group))[dist.get_rank(group)]
        return _WidthNorm.apply(flat, weight, self.eps, group).view(hidden.shape)


class AddNormalised(nn.Module):
    """The norm of what attention or feed-forward give, added to the residual stream: norms after, instead of before.

    It stands where Megatron-Core adds bias and residual (``self_attn_bda``, ``mlp_bda``).
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """What Megatron-Core calls with the result and its bias, the residual [S, B, hidden], and the dropout."""
        return self._add

    def _add(self, result: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = result
        ensure(bias is None and dropout == 0, "linear layers here have no bias behind them, and no dropout")
        return residual + self.norm(output)

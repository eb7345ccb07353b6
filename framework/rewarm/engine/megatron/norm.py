"""Root-mean-square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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

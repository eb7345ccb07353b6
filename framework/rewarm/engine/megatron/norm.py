"""Root-mean-square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in fp32.

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
        if hidden.dtype == torch.float32:
            return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        normalised = nn.functional.rms_norm(hidden.float(), self.weight.shape, None, self.eps)
        return normalised.to(hidden.dtype) * self.weight

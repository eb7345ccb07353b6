"""See the package."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import distributed, fp8

__all__ = ["DotProductAttention", "LayerNorm", "LayerNormLinear", "Linear", "RMSNorm", "distributed", "fp8"]


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


class _Module(nn.Module):
    def get_extra_state(self) -> None:
        """fp8's scales in the real one."""

    def set_extra_state(self, state: Any) -> None:
        """See above."""


class RMSNorm(nn.Module):
    def __init__(
        self, hidden_size: int, eps: float, *, sequence_parallel: bool, params_dtype: Any, **more: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(x, self.weight, self.eps)


class LayerNorm(RMSNorm):
    pass


class Linear(_Module):
    def __init__(
        self, in_features: int, out_features: int, *, tp_size: int, parallel_mode: Any, bias: bool, params_dtype: Any,
        **more: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert tp_size == 1
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.parallel_mode = parallel_mode
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype)) if bias else None
        for parameter in self.parameters(recurse=False):
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = int(parallel_mode == "row")  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor, is_first_microbatch: Any = None) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class LayerNormLinear(Linear):
    def __init__(self, *args: Any, eps: float, normalization: str, sequence_parallel: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert normalization == "RMSNorm"
        self.eps = eps
        norm = nn.Parameter(torch.ones(self.in_features, dtype=self.weight.dtype))
        norm.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm_weight = norm

    def forward(self, x: Tensor, is_first_microbatch: Any = None) -> Tensor:
        return super().forward(_normalised(x, self.layer_norm_weight, self.eps))


class DotProductAttention(nn.Module):
    # The real one has an extra state too, which a load may lack.
    def __init__(self, **settings: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, attn_mask_type: str = "") -> Tensor:
        assert attn_mask_type == "causal"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = k.shape[1] != q.shape[1]
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return found.permute(2, 0, 1, 3).flatten(2)

"""Core attention with rotary positions, in Megatron-Core's layout [S, B, heads, head_dim]."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rewarm.engine.megatron.rotary import Rotary


class SDPACore(nn.Module):
    """Causal attention through torch's scaled-dot-product kernels, which never hold the [S, S] scores."""

    def __init__(self, config: Any, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.rotary: Rotary = config.rotary
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Args: query [S, B, N, D], key and value [S, B, G, D]. Returns: [S, B, N * D]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (self.rotary(query), self.rotary(key), value))
        grouped = k.shape[1] != q.shape[1]
        context = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return context.permute(2, 0, 1, 3).flatten(2)


def with_rotary(core: type) -> type:
    """A core attention class of Megatron-Core that first turns queries and keys."""

    class RotaryCore(core):  # type: ignore[misc, valid-type]
        """The given core behind rotary positions."""

        def forward(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Args and result as the given core's."""
            rotary: Rotary = self.config.rotary
            return super().forward(rotary(query), rotary(key), *args, **kwargs)

    return RotaryCore


LocalCore = with_rotary(DotProductAttention)

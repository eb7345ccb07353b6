"""OLMo 2.

In bfloat16 transformers rounds after the product with a norm's weight, and the engine before it, as in other families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewarm.config.registry import FAMILIES
from rewarm.model.architecture import Architecture
from rewarm.model.families.base import (
    ATTENTION_NORM_AFTER,
    ATTENTION_OUTPUT,
    FEED_FORWARD,
    MLP_NORM_AFTER,
    QKV,
    WIDTH_NORMS,
    Family,
    LayerTensor,
)


@FAMILIES.register("olmo2")
class Olmo2(Family):
    """Norms after attention and feed-forward, and of queries and keys over all heads (OLMo et al. 2024,
    arXiv:2501.00656)."""

    huggingface_class = "Olmo2ForCausalLM"
    tensors = (
        *QKV,
        ATTENTION_OUTPUT,
        *WIDTH_NORMS,
        *FEED_FORWARD,
        LayerTensor("post_attention_layernorm.weight", ("hidden",), "whole", ATTENTION_NORM_AFTER),
        LayerTensor("post_feedforward_layernorm.weight", ("hidden",), "whole", MLP_NORM_AFTER),
    )
    default_positions = 2048
    default_norm_epsilon = 1e-5

    @classmethod
    def written(cls, architecture: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
        """transformers takes an id of OLMo's tokenizer for a missing padding token, whose row would get no gradient."""
        padding: dict[str, Any] = {} if original else {"pad_token_id": None}
        return super().written(architecture, original) | padding

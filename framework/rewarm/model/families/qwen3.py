"""Qwen3, dense, without sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewarm.config.registry import FAMILIES
from rewarm.model.architecture import Architecture
from rewarm.model.config_values import Values
from rewarm.model.families.base import (
    ATTENTION_OUTPUT,
    FEED_FORWARD,
    HEAD_NORMS,
    INPUT_NORM,
    MLP_NORM,
    QKV,
    Family,
    missing,
    need_key_heads,
)
from rewarm.model.families.qwen2 import Qwen2


@FAMILIES.register("qwen3")
class Qwen3(Family):
    """As llama, with norms of queries and keys per head (Yang et al. 2025, arXiv:2505.09388)."""

    huggingface_class = "Qwen3ForCausalLM"
    tensors = (INPUT_NORM, *QKV, ATTENTION_OUTPUT, *HEAD_NORMS, MLP_NORM, *FEED_FORWARD)
    default_positions = 32768
    own_keys = ("use_qk_norm", "qk_norm", "qk_layernorm")

    @classmethod
    def check_config(cls, config: Values) -> None:
        """transformers takes heads 128 wide where their width is missing."""
        if config.get("head_dim") is None:
            raise missing(config, "head_dim", "width of one head")
        need_key_heads(config)

    @classmethod
    def window(cls, config: Values) -> Any:
        """As for qwen2."""
        return Qwen2.window(config)

    @classmethod
    def written(cls, architecture: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
        """A missing width of a head would be 128."""
        return super().written(architecture, original) | {"head_dim": architecture.head_dim}

"""Qwen2 and Qwen2.5, without sliding windows."""

from __future__ import annotations

from typing import Any

from rewarm.config.registry import FAMILIES
from rewarm.model.config_values import Values
from rewarm.model.families.base import (
    ATTENTION_OUTPUT,
    FEED_FORWARD,
    INPUT_NORM,
    MLP_NORM,
    QKV_WITH_BIAS,
    Family,
    need_key_heads,
)


@FAMILIES.register("qwen2")
class Qwen2(Family):
    """As llama, with biases of query, key and value (Yang et al. 2024, arXiv:2407.10671)."""

    huggingface_class = "Qwen2ForCausalLM"
    tensors = (INPUT_NORM, *QKV_WITH_BIAS, ATTENTION_OUTPUT, MLP_NORM, *FEED_FORWARD)
    default_positions = 32768
    own_keys = ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias", "attention_qkv_bias")

    @classmethod
    def check_config(cls, config: Values) -> None:
        """transformers takes 32 key heads where their number is missing."""
        need_key_heads(config)

    @classmethod
    def window(cls, config: Values) -> Any:
        """transformers looks at the layers' types where they are given, else at how many layers come before the
        window."""
        if config.get("layer_types") or not config.flag("use_sliding_window"):
            return None
        if config.count("max_window_layers", default=28, minimum=0) >= config.count("num_hidden_layers"):
            return None
        given = "sliding_window" in config.values
        return config.get("sliding_window") if given else config.count("sliding_window", default=4096)

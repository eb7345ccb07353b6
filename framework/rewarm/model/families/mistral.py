"""Mistral 7B and those after it, without sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewarm.config.registry import FAMILIES
from rewarm.model.architecture import Architecture
from rewarm.model.config_values import Values
from rewarm.model.families.base import (
    ATTENTION_OUTPUT,
    FEED_FORWARD,
    INPUT_NORM,
    MLP_NORM,
    QKV,
    Family,
    need_key_heads,
)


@FAMILIES.register("mistral")
class Mistral(Family):
    """As llama, with heads of any width (Jiang et al. 2023, arXiv:2310.06825)."""

    huggingface_class = "MistralForCausalLM"
    tensors = (INPUT_NORM, *QKV, ATTENTION_OUTPUT, MLP_NORM, *FEED_FORWARD)
    default_positions = 131072

    @classmethod
    def check_config(cls, config: Values) -> None:
        """transformers takes 8 key heads where their number is missing."""
        need_key_heads(config)

    @classmethod
    def window(cls, config: Values) -> Any:
        """transformers takes 4096 for a missing key."""
        return config.values.get("sliding_window", 4096)

    @classmethod
    def written(cls, architecture: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
        """A missing window would be one of 4096."""
        return super().written(architecture, original) | {"sliding_window": original.get("sliding_window")}

"""Shape of a model that starts from random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from rewarm.config.registry import FAMILIES
from rewarm.config.section import Section


class ModelBase(Section):
    """A Llama-style decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    num_layers: int = Field(4, gt=0)
    """Transformer layers."""
    hidden_size: int = Field(128, gt=0)
    """Width of the residual stream."""
    ffn_hidden_size: int = Field(352, gt=0)
    """Width of the SwiGLU hidden layer."""
    num_attention_heads: int = Field(4, gt=0)
    """Query heads."""
    num_key_value_heads: int | None = Field(None, gt=0)
    """Key and value heads; null means as many as query heads."""
    head_dim: int | None = Field(None, gt=0)
    """Width of one head; null means hidden_size / num_attention_heads."""
    vocab_size: int | None = Field(None, gt=0)
    """Rows of the embedding; null means the tokenizer's length."""
    max_position_embeddings: int = Field(2048, gt=0)
    """Longest sequence the exported model announces, in tokens; at least batch.sequence_length."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_epsilon: float = Field(1e-5, gt=0)
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """Share the embedding with the output layer."""
    qkv_bias: bool = False
    """Add a bias to the query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """Normalise queries and keys: per head (Qwen3) or over all heads together (OLMo 2)."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights; output projections are scaled by 1/sqrt(2 * num_layers)."""
    family: str = "llama"
    """Hugging Face architecture that an export is written as."""

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        heads, groups = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % groups:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}")
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; set head_dim"
            )
        return self


if TYPE_CHECKING:
    ModelConfig = ModelBase
else:
    ModelConfig = FAMILIES.section(ModelBase, "family")

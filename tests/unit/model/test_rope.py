"""Rotary frequencies against those of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rewarm.config.model import ModelConfig
from rewarm.model.architecture import Architecture
from rewarm.model.rope import inverse_frequencies
from unit.model.families import LLAMA3_SCALING


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3_SCALING,
        {**LLAMA3_SCALING, "factor": 32.0, "original_max_position_embeddings": 8192, "low_freq_factor": 2.0},
    ],
    ids=["plain", "linear", "llama3", "llama3-other"],
)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_frequencies_equal_those_of_transformers(scaling: dict[str, Any] | None, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    base = Architecture.from_config(ModelConfig(hidden_size=4 * head_dim, rope_theta=5e5), vocab_size=100)
    ours = inverse_frequencies(replace(base, rope_scaling=scaling))
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": 5e5}
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=parameters
    )
    theirs = LlamaRotaryEmbedding(config).inv_freq
    assert ours.dtype == torch.float32 and ours.shape == (head_dim // 2,)
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)
    if scaling is not None:
        assert not torch.equal(ours, inverse_frequencies(base))

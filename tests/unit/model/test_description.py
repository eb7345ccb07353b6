"""What each engine knows of a model that comes from the other."""

from __future__ import annotations

import pytest

from rewarm.config.model import ModelConfig
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.description import HuggingFaceModel, for_other_engine

SIZES = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tie_embeddings": True, "rope_theta": 5e5},
        {"family": "qwen2", "qkv_bias": True},
        {"family": "qwen3", "qk_norm": True, "head_dim": 24},
        {"family": "mistral", "norm_epsilon": 1e-6},
    ],
)
def test_there_and_back_is_the_same_model(more: dict[str, object]) -> None:
    architecture = Architecture.from_config(ModelConfig.model_validate(SIZES | more), 300)
    there = for_other_engine(architecture, "bfloat16")
    assert isinstance(there, HuggingFaceModel)
    assert there.vocab_size == 300 and there.config["torch_dtype"] == "bfloat16"
    assert for_other_engine(there, "bfloat16") == architecture


def test_a_family_that_is_not_mapped_is_named() -> None:
    with pytest.raises(UserError, match="gemma"):
        for_other_engine(HuggingFaceModel({"model_type": "gemma", "vocab_size": 300}), "float32")

"""Numbers that follow from a model's shape."""

from __future__ import annotations

from rewarm.model.architecture import Architecture, parameter_count


def test_parameter_count_of_llama_3_8b() -> None:
    """8,030,261,248: the sum of the tensor sizes in the published index of meta-llama/Meta-Llama-3-8B."""
    llama = Architecture(
        family="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        norm_epsilon=1e-5,
        tie_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
    )
    assert parameter_count(llama) == 8_030_261_248

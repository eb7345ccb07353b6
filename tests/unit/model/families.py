"""Small random models of every family, as transformers builds and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rewarm.config.registry import FAMILIES

VOCAB_SIZE = 301
"""Prime to every padding divisor, so that padded rows exist on every layout."""
SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # logits of a standard deviation above 1, so that 1e-4 means something
    "bos_token_id": None,
    "eos_token_id": 7,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NAMES = (
    "llama2",
    "llama3",
    "mistral",
    "qwen2",
    "qwen2_tied",
    "qwen3",
    *sorted(set(FAMILIES) - {"llama", "mistral", "qwen2", "qwen3"}),
)
"""Models to build; a family that needs no setting of its own is one of them by being registered."""


def transformers_config(name: str) -> Any:
    """The configuration object of one of :data:`NAMES`."""
    from transformers import CONFIG_MAPPING, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    def theta(value: float, **scaling: Any) -> dict[str, Any]:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": value, **scaling}}

    if name == "llama2":
        return LlamaConfig(**{**SHARED, "num_key_value_heads": 4})
    if name == "llama3":
        return LlamaConfig(**SHARED, **theta(5e5, **LLAMA3_SCALING), tie_word_embeddings=True, rms_norm_eps=1e-5)
    if name == "mistral":
        return MistralConfig(**SHARED, **theta(1e6), sliding_window=None, head_dim=24)
    if name == "qwen3":
        return Qwen3Config(**SHARED, **theta(1e6), head_dim=32)
    if name in ("qwen2", "qwen2_tied"):
        return Qwen2Config(**SHARED, tie_word_embeddings=name == "qwen2_tied")
    return CONFIG_MAPPING[name](**SHARED, **theta(5e5), pad_token_id=None)


def save_model(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Any:
    """Build a random model with norms and biases that are not ones and zeros, save it and return it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(NAMES.index(name))
    model = AutoModelForCausalLM.from_config(transformers_config(name)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def windows(num_windows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random tokens, int64 [num_windows, length]."""
    return torch.randint(0, VOCAB_SIZE, (num_windows, length), generator=torch.Generator().manual_seed(seed))


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file in a folder."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors

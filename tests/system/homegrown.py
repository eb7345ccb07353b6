"""A Hugging Face folder whose model is known only by the Python files in it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

_CONFIGURATION = """
from transformers import PreTrainedConfig


class HomegrownConfig(PreTrainedConfig):
    model_type = "homegrown"
    vocab_size: int = 8
    hidden_size: int = 4
"""
_MODELING = '''
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_homegrown import HomegrownConfig


class HomegrownForCausalLM(PreTrainedModel, GenerationMixin):
    """Mean of all embeddings so far, then a matrix."""

    config_class = HomegrownConfig
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None, **more):
        hidden = self.embed(input_ids).cumsum(1)
        steps = torch.arange(1, input_ids.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)
        return CausalLMOutput(logits=self.head(hidden / steps[:, None]))
'''


def write_homegrown(folder: Path, vocab_size: int) -> Path:
    """Random weights, seeded."""
    folder.mkdir()
    (folder / "configuration_homegrown.py").write_text(_CONFIGURATION)
    (folder / "modeling_homegrown.py").write_text(_MODELING)
    names = {
        "AutoConfig": "configuration_homegrown.HomegrownConfig",
        "AutoModelForCausalLM": "modeling_homegrown.HomegrownForCausalLM",
    }
    config = {"model_type": "homegrown", "vocab_size": vocab_size, "hidden_size": 16, "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["HomegrownForCausalLM"]}))
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(vocab_size, 16, generator=generator) for name in ("embed.weight", "head.weight")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

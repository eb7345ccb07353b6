"""Llama 1, 2 and 3, and whatever else is published as ``model_type: llama``."""

from __future__ import annotations

from rewarm.config.registry import FAMILIES
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.families.base import ATTENTION_OUTPUT, FEED_FORWARD, INPUT_NORM, MLP_NORM, QKV, Family


@FAMILIES.register("llama")
class Llama(Family):
    """Norms before attention and feed-forward, no biases (Touvron et al. 2023, arXiv:2302.13971)."""

    huggingface_class = "LlamaForCausalLM"
    tensors = (INPUT_NORM, *QKV, ATTENTION_OUTPUT, MLP_NORM, *FEED_FORWARD)
    default_positions = 2048

    @classmethod
    def check_architecture(cls, architecture: Architecture) -> None:
        """transformers' LlamaConfig takes no width of a head that does not follow from the others."""
        if architecture.hidden_size % architecture.num_attention_heads:
            raise UserError(
                f"model.family=llama needs hidden_size={architecture.hidden_size} to be a multiple of "
                f"num_attention_heads={architecture.num_attention_heads}",
                fix="choose model.family=mistral, which takes any head_dim, or change the sizes",
            )

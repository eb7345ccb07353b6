"""What a model family says of itself on its page, and the rows that most pages share. No torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rewarm.config.registry import FAMILIES

if TYPE_CHECKING:
    from rewarm.errors import UserError
    from rewarm.model.architecture import Architecture
    from rewarm.model.config_values import Values

Split = Literal["whole", "vocabulary", "columns", "qkv", "gate_up"]
"""How Megatron-Core joins tensors into a parameter, and how tensor ranks divide it. whole: one tensor, on every rank;
vocabulary: by rows, padded; columns: by columns; qkv: query, key and value interleaved by key-value group, then by
rows; gate_up: one above the other, each divided by rows."""

Size = Literal["hidden", "ffn", "head", "query", "key"]
"""A dimension: the residual stream, the feed-forward's inner width, one head, all query heads, all key heads."""


@dataclass(frozen=True, slots=True)
class LayerTensor:
    """One tensor of a layer."""

    name: str
    """Hugging Face's, after ``model.layers.<n>.``."""
    shape: tuple[Size, ...]
    split: Split
    megatron: str
    """Parameter of Megatron-Core's layer that holds it; the rows that name the same one are joined in their order."""
    fused: str | None = None
    """Its name where Transformer Engine fuses it with the matrix behind it."""

    def dimensions(self, architecture: Architecture) -> tuple[int, ...]:
        """The shape in numbers."""
        sizes = {
            "hidden": architecture.hidden_size,
            "ffn": architecture.ffn_hidden_size,
            "head": architecture.head_dim,
            "query": architecture.num_attention_heads * architecture.head_dim,
            "key": architecture.num_key_value_heads * architecture.head_dim,
        }
        return tuple(sizes[size] for size in self.shape)


_QKV, _BIAS = "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"
_FC1 = "mlp.linear_fc1.weight"
INPUT_NORM = LayerTensor(
    "input_layernorm.weight",
    ("hidden",),
    "whole",
    "input_layernorm.weight",
    fused="self_attention.linear_qkv.layer_norm_weight",
)
QKV = (
    LayerTensor("self_attn.q_proj.weight", ("query", "hidden"), "qkv", _QKV),
    LayerTensor("self_attn.k_proj.weight", ("key", "hidden"), "qkv", _QKV),
    LayerTensor("self_attn.v_proj.weight", ("key", "hidden"), "qkv", _QKV),
)
QKV_WITH_BIAS = (
    QKV[0],
    LayerTensor("self_attn.q_proj.bias", ("query",), "qkv", _BIAS),
    QKV[1],
    LayerTensor("self_attn.k_proj.bias", ("key",), "qkv", _BIAS),
    QKV[2],
    LayerTensor("self_attn.v_proj.bias", ("key",), "qkv", _BIAS),
)
ATTENTION_OUTPUT = LayerTensor(
    "self_attn.o_proj.weight", ("hidden", "query"), "columns", "self_attention.linear_proj.weight"
)
HEAD_NORMS = (
    LayerTensor("self_attn.q_norm.weight", ("head",), "whole", "self_attention.q_layernorm.weight"),
    LayerTensor("self_attn.k_norm.weight", ("head",), "whole", "self_attention.k_layernorm.weight"),
)
WIDTH_NORMS = (
    LayerTensor("self_attn.q_norm.weight", ("query",), "whole", "self_attention.q_layernorm.weight"),
    LayerTensor("self_attn.k_norm.weight", ("key",), "whole", "self_attention.k_layernorm.weight"),
)
MLP_NORM = LayerTensor(
    "post_attention_layernorm.weight",
    ("hidden",),
    "whole",
    "pre_mlp_layernorm.weight",
    fused="mlp.linear_fc1.layer_norm_weight",
)
FEED_FORWARD = (
    LayerTensor("mlp.gate_proj.weight", ("ffn", "hidden"), "gate_up", _FC1),
    LayerTensor("mlp.up_proj.weight", ("ffn", "hidden"), "gate_up", _FC1),
    LayerTensor("mlp.down_proj.weight", ("hidden", "ffn"), "columns", "mlp.linear_fc2.weight"),
)
ATTENTION_NORM_AFTER = "self_attn_bda.norm.weight"
"""Megatron-Core's parameter of a norm after attention; ours, see :class:`rewarm.engine.megatron.norm.AddNormalised`."""
MLP_NORM_AFTER = "mlp_bda.norm.weight"
"""As :data:`ATTENTION_NORM_AFTER`, after the feed-forward."""


class Family:
    """A family of decoders with RMSNorm, SwiGLU and rotary positions, under the name that transformers gives it.

    A page subclasses it, registers itself in :data:`rewarm.config.registry.FAMILIES` and overrides what differs.
    """

    huggingface_class: ClassVar[str]
    """transformers' causal language model."""
    tensors: ClassVar[tuple[LayerTensor, ...]]
    """Those of one layer, in the order in which transformers writes them. Biases, norms of queries and keys, and the
    place of the norms follow from them."""
    default_positions: ClassVar[int]
    """What transformers takes for max_position_embeddings where it is not given."""
    default_norm_epsilon: ClassVar[float] = 1e-6
    """What transformers takes for rms_norm_eps where it is not given."""
    own_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of a config.json that may be true, as they name what the family always has."""

    @classmethod
    def check_config(cls, config: Values) -> None:
        """Refuse a config.json that leaves out what the family cannot do without.

        Raises:
            UserError: naming the key.
        """

    @classmethod
    def window(cls, config: Values) -> Any:
        """What transformers takes for the width of attention, as it is written; None for the whole sequence."""
        return config.get("sliding_window")

    @classmethod
    def written(cls, architecture: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of an exported config.json beside those that every family has.

        Args:
            architecture: the model.
            original: the config.json it came from; empty for one that started from random weights.
        """
        usual = architecture.hidden_size // architecture.num_attention_heads
        differs = "head_dim" in original or architecture.head_dim != usual
        return {"head_dim": architecture.head_dim} if differs else {}

    @classmethod
    def check_architecture(cls, architecture: Architecture) -> None:
        """Refuse sizes that transformers' class cannot express.

        Raises:
            UserError: naming the setting.
        """

    @classmethod
    @functools.cache
    def parameters(cls) -> dict[str, tuple[Split, tuple[str, ...]]]:
        """Megatron-Core's parameters of one layer with the Hugging Face tensors that each holds."""
        found: dict[str, tuple[Split, tuple[str, ...]]] = {}
        for tensor in cls.tensors:
            for name in filter(None, (tensor.megatron, tensor.fused)):
                found[name] = (tensor.split, (*found.get(name, (tensor.split, ()))[1], tensor.name))
        return found

    @classmethod
    def has_qkv_bias(cls) -> bool:
        """True if query, key and value projections have biases."""
        return _BIAS in cls.parameters()

    @classmethod
    def qk_norm(cls) -> Literal["none", "head", "width"]:
        """Over what queries and keys are normalised: nothing, each head, or all heads together."""
        shapes = {tensor.shape for tensor in cls.tensors if tensor.megatron == WIDTH_NORMS[0].megatron}
        return "none" if not shapes else "head" if shapes == {("head",)} else "width"

    @classmethod
    def norms_after(cls) -> bool:
        """True if the results of attention and feed-forward are normalised, instead of what goes into them."""
        return ATTENTION_NORM_AFTER in cls.parameters()

    @classmethod
    def layer_parameters(cls, architecture: Architecture, tensor_ranks: int = 1) -> int:
        """Parameters of one layer on one of ``tensor_ranks`` ranks."""
        return sum(
            math.prod(tensor.dimensions(architecture)) // (1 if tensor.split == "whole" else tensor_ranks)
            for tensor in cls.tensors
        )


def family_of(architecture: Architecture) -> type[Family]:
    """The page of an architecture's family.

    Raises:
        UserError: if no family of its name is registered.
    """
    found: type[Family] = FAMILIES[architecture.family].target
    return found


def need_key_heads(config: Values) -> None:
    """Refuse a config.json without a number of key heads, for which transformers takes one that fits no other size.

    Raises:
        UserError: naming the key.
    """
    if "num_key_value_heads" not in config.values:
        raise missing(config, "num_key_value_heads", "number of key heads")


def missing(config: Values, key: str, what: str) -> UserError:
    """The error about a key that is left out."""
    return config.refusal(key, "is missing", f"write the {what} into config.json")

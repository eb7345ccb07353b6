"""The shape of a dense Llama-family decoder, as every engine and every file format here understands it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rewarm.config.model import ModelConfig
from rewarm.errors import UserError

Family = Literal["llama", "mistral", "qwen2", "qwen3"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Everything that decides a model's function apart from its weights."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding without padding."""
    max_position_embeddings: int
    rope_theta: float
    norm_epsilon: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    initializer_range: float = 0.02
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face's ``rope_scaling`` of a kind that is honoured, or None."""
    huggingface_config: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    """The config.json it was read from, so that an export keeps what is beside the shape (token ids, ...)."""

    @classmethod
    def from_config(cls, config: ModelConfig, vocab_size: int) -> Architecture:
        """The architecture of a model that starts from random weights.

        Args:
            config: its shape; ``config.vocab_size`` wins over ``vocab_size``.
            vocab_size: length of the tokenizer.

        Raises:
            UserError: if the family's Hugging Face class cannot express the shape, so that no export would load.
        """
        heads = config.num_attention_heads
        architecture = cls(
            family=config.family,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.ffn_hidden_size,
            num_attention_heads=heads,
            num_key_value_heads=config.num_key_value_heads or heads,
            head_dim=config.head_dim or config.hidden_size // heads,
            vocab_size=config.vocab_size or vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            rope_theta=config.rope_theta,
            norm_epsilon=config.norm_epsilon,
            tie_embeddings=config.tie_embeddings,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            initializer_range=config.initializer_range,
        )
        check_family(architecture)
        return architecture

    def padded_vocab_size(self, divisor: int, tensor: int) -> int:
        """Rows of the embedding once it is padded so that every tensor rank holds a multiple of ``divisor``."""
        multiple = divisor * tensor
        return -(-self.vocab_size // multiple) * multiple

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """The inverse of :meth:`to_dict`."""
        return cls(**values)


def check_family(architecture: Architecture) -> None:
    """Refuse an architecture that its family's transformers class cannot express.

    Raises:
        UserError: naming the two settings that contradict each other.
    """
    family = architecture.family
    for name, value, owner in (
        ("qkv_bias", architecture.qkv_bias, "qwen2"),
        ("qk_norm", architecture.qk_norm, "qwen3"),
    ):
        if value != (family == owner):
            raise UserError(
                f"model.{name}={str(value).lower()} cannot be written as model.family={family}",
                fix=f"family {owner} has {name}=true, every other family {name}=false",
            )
    if family == "llama" and architecture.hidden_size % architecture.num_attention_heads:
        raise UserError(
            f"model.family=llama needs hidden_size={architecture.hidden_size} to be a multiple of "
            f"num_attention_heads={architecture.num_attention_heads}",
            fix="choose model.family=mistral, which takes any head_dim, or change the sizes",
        )


def parameter_count(architecture: Architecture) -> int:
    """Parameters of the whole model, without padded vocabulary rows; a tied embedding counts once."""
    a = architecture
    query, group = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    attention = a.hidden_size * (query + 2 * group) + query * a.hidden_size
    attention += (query + 2 * group) * a.qkv_bias + 2 * a.head_dim * a.qk_norm
    layer = attention + 3 * a.hidden_size * a.ffn_hidden_size + 2 * a.hidden_size
    embeddings = a.vocab_size * a.hidden_size * (1 if a.tie_embeddings else 2)
    return a.num_layers * layer + embeddings + a.hidden_size

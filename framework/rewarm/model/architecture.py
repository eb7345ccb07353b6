"""The shape of a dense Llama-family decoder, as every engine and every file format here understands it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rewarm.config.registry import FAMILIES
from rewarm.errors import UserError
from rewarm.model.families.base import family_of

if TYPE_CHECKING:
    from rewarm.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Architecture:
    """Everything that decides a model's function apart from its weights."""

    family: str
    """Name of a registered :class:`~rewarm.model.families.base.Family`."""
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
    family = family_of(architecture)
    for setting, value, has in (
        ("qkv_bias", architecture.qkv_bias, lambda page: page.has_qkv_bias()),
        ("qk_norm", architecture.qk_norm, lambda page: page.qk_norm() != "none"),
    ):
        if value != has(family):
            owners = [method.name for method in FAMILIES.methods() if has(method.target)]
            raise UserError(
                f"model.{setting}={str(value).lower()} cannot be written as model.family={architecture.family}",
                fix=f"{setting} is true in {', '.join(owners)} and false in every other family",
            )
    family.check_architecture(architecture)


def parameter_count(architecture: Architecture) -> int:
    """Parameters of the whole model, without padded vocabulary rows; a tied embedding counts once."""
    table = architecture.vocab_size * architecture.hidden_size
    layer = family_of(architecture).layer_parameters(architecture)
    return (
        (1 if architecture.tie_embeddings else 2) * table + architecture.num_layers * layer + architecture.hidden_size
    )

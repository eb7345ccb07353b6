"""What is known of a model whatever engine runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarm.data.model_folder import check_model_folder
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.huggingface import (
    architecture_from_huggingface,
    architecture_from_values,
    config_for_huggingface,
    read_config,
)

_CONFIG = "huggingface"
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


@dataclass(frozen=True, slots=True)
class HuggingFaceModel:
    """Any causal language model of transformers, by its config.json."""

    config: dict[str, Any]
    """The parsed file."""
    code_folder: str | None = None
    """Where the Python files of a model that brings its own lie; None for a model that transformers knows."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> HuggingFaceModel:
        """The model of a Hugging Face folder; its weights are not read.

        Raises:
            UserError: if there is no readable config.json.
        """
        config = read_config(folder)
        return cls(config, str(Path(folder).resolve()) if config.get("auto_map") else None)

    @property
    def model_type(self) -> str:
        """transformers' name of the family, or ``unknown``."""
        return str(self.config.get("model_type") or "unknown")

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding.

        Raises:
            UserError: if config.json does not say.
        """
        value = self._find("vocab_size")
        if not isinstance(value, int) or value < 1:
            raise UserError(f"the config.json of this {self.model_type} model gives no vocab_size")
        return value

    @property
    def max_position_embeddings(self) -> int | None:
        """Longest sequence in tokens; None for a model without such a limit."""
        found = (self._find(key) for key in _POSITION_KEYS)
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    @property
    def num_experts(self) -> int | None:
        """Experts of a layer; None for a dense model."""
        found = (self._find(key) for key in _EXPERT_KEYS)
        return next((value for value in found if isinstance(value, int) and value > 1), None)

    @property
    def router_loss_factor(self) -> float:
        """Factor of the loss by which its makers kept a router's experts in balance; 0 where there is none."""
        value = self._find("router_aux_loss_coef")
        return float(value) if isinstance(value, int | float) else 0.0

    def _find(self, key: str) -> Any:
        """A key of the file, or of the part that describes the text model of one that also sees or hears."""
        text = self.config.get("text_config")
        nested = text.get(key) if isinstance(text, dict) else None
        return self.config.get(key, nested)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; :func:`description_from_dict` reads them."""
        return {_CONFIG: self.config, "code_folder": self.code_folder}


ModelDescription = Architecture | HuggingFaceModel
"""What an engine runs: a shape that is mapped (megatron), or whatever transformers knows (deepspeed)."""


def description_from_dict(values: Mapping[str, Any]) -> ModelDescription:
    """The inverse of ``to_dict`` of either kind."""
    if _CONFIG in values:
        return HuggingFaceModel(dict(values[_CONFIG]), values.get("code_folder"))
    return Architecture.from_dict(dict(values))


def describe(folder: str | Path, engine: str) -> ModelDescription:
    """The model of a Hugging Face folder as an engine wants it.

    Args:
        folder: holds config.json.
        engine: ``megatron`` needs a family that is mapped; ``deepspeed`` takes what transformers knows.

    Raises:
        UserError: if the engine cannot run it, or files of it are links out of the folder.
    """
    check_model_folder(folder)
    return HuggingFaceModel.from_folder(folder) if engine == "deepspeed" else architecture_from_huggingface(folder)


def from_scratch(architecture: Architecture, engine: str, precision: str) -> ModelDescription:
    """A model without parent, as an engine wants it."""
    return HuggingFaceModel(config_for_huggingface(architecture, precision)) if engine == "deepspeed" else architecture


def for_other_engine(model: ModelDescription, precision: str) -> ModelDescription:
    """The description that the other engine has of a model.

    Raises:
        UserError: if the other engine does not know the model.
    """
    if isinstance(model, HuggingFaceModel):
        return architecture_from_values(model.config, f"the config.json of this {model.model_type} model")
    return from_scratch(model, "deepspeed", precision)

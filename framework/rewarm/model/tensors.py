"""Names and shapes of the tensors of a Hugging Face folder, in the order in which transformers writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.families.base import family_of
from rewarm.model.safetensors_io import TensorFolder

if TYPE_CHECKING:
    import torch

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT = "lm_head.weight"


class TensorReader(Protocol):
    """Whatever has the tensors of a model by their Hugging Face names."""

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        """A block of one tensor, in the type it is stored in; None as ``columns`` means all of them."""


def layer_prefix(layer: int) -> str:
    """Start of the names of one layer's tensors; layers count from 0."""
    return f"model.layers.{layer}."


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its Hugging Face name; tied models have no output layer of their own."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (architecture.vocab_size, architecture.hidden_size)}
    tensors = family_of(architecture).tensors
    for layer in range(architecture.num_layers):
        shapes |= {layer_prefix(layer) + tensor.name: tensor.dimensions(architecture) for tensor in tensors}
    shapes[FINAL_NORM] = (architecture.hidden_size,)
    if not architecture.tie_embeddings:
        shapes[OUTPUT] = (architecture.vocab_size, architecture.hidden_size)
    return shapes


def check_shapes(found: Mapping[str, tuple[int, ...]], architecture: Architecture, source: str) -> None:
    """Refuse a set of tensors that is not exactly the model's.

    Args:
        found: shape of every tensor by its Hugging Face name.
        architecture: what config.json announces.
        source: the folder, for messages.

    Raises:
        UserError: naming the first missing, surplus or misshapen tensor.
    """
    expected = tensor_shapes(architecture)
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(
            f"{source} lacks the tensor {missing[0]} ({len(missing)} missing in all)",
            fix="download the folder again; if the model shares its embedding with the output layer, config.json "
            "must say tie_word_embeddings: true"
            if missing == [OUTPUT]
            else "check that the folder is a complete causal language model of the kind that config.json names",
        )
    surplus = sorted(name for name in found if name not in expected)
    if surplus:
        raise UserError(
            f"{source} holds the tensor {surplus[0]}, which the model of its config.json does not have "
            f"({len(surplus)} such tensors)",
            fix="config.json and the weights must describe the same model",
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UserError(
                f"{source}: the tensor {name} has shape {tuple(found[name])} where config.json asks for {shape}",
                fix="config.json and the weights must describe the same model",
            )


def open_weights(folder: str | Path, architecture: Architecture) -> TensorFolder:
    """The tensors of a Hugging Face folder, checked against the architecture before any is read.

    Stored rotary frequencies (old Llama 2 folders) are left out, since they follow from config.json; so is the copy
    of the embedding that some tied models carry as their output layer, once it was seen to be equal.

    Raises:
        UserError: naming the tensor that is missing, surplus, misshapen, of a wrong type, or contradicts tying.
    """
    weights = TensorFolder(folder)
    shapes = weights.shapes()
    for name in [name for name in shapes if name.endswith(".rotary_emb.inv_freq")]:
        weights.drop(name)
        del shapes[name]
    if architecture.tie_embeddings and OUTPUT in shapes and EMBEDDING not in shapes:
        weights.rename(OUTPUT, EMBEDDING)  # transformers ties whichever of the two is there
        shapes[EMBEDDING] = shapes.pop(OUTPUT)
    if architecture.tie_embeddings and shapes.get(OUTPUT) is not None and shapes[OUTPUT] == shapes.get(EMBEDDING):
        _check_equal(weights, shapes[OUTPUT][0])
        weights.drop(OUTPUT)
        del shapes[OUTPUT]
    check_shapes(shapes, architecture, str(folder))
    weights.check_trainable(shapes)
    return weights


def _check_equal(weights: TensorFolder, num_rows: int, block: int = 16384) -> None:
    import torch

    for start in range(0, num_rows, block):
        rows = slice(start, min(start + block, num_rows))
        if not torch.equal(weights.read(OUTPUT, rows), weights.read(EMBEDDING, rows)):
            raise UserError(
                f"{weights.folder}: config.json has tie_word_embeddings = true, but {OUTPUT} differs from {EMBEDDING}",
                fix="set tie_word_embeddings to false in config.json if the output layer was trained on its own",
            )

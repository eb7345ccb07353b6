"""Random weights that depend on the seed and the parameter's name alone, so that every layout starts the same."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from rewarm.engine.megatron.transformer import Decoder
from rewarm.model.architecture import Architecture

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"


def global_parameters(chunk: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a chunk by their names in the whole model: layers count from 0 across the pipeline."""
    offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    for name, parameter in chunk.named_parameters():
        shifted = re.sub(
            r"(decoder\.layers\.)(\d+)", lambda match: f"{match[1]}{int(match[2]) + offset}", name, count=1
        )
        yield shifted, parameter


@torch.no_grad()
def initialize(chunks: Sequence[Decoder], architecture: Architecture, seed: int) -> None:
    """Draw every weight of this rank, holding one full tensor at a time.

    Matrices are normal with ``initializer_range``; those that write to the residual stream are scaled by
    1/sqrt(2 * num_layers) (Radford et al., 2019); norms are one; biases and padded vocabulary rows are zero.
    """
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                source = _EMBEDDING if name == _OUTPUT and architecture.tie_embeddings else name
                _draw(source, parameter, architecture, seed)


@torch.no_grad()
def clear_padding(chunks: Sequence[Decoder], architecture: Architecture) -> None:
    """Set the rows that pad the vocabulary to zero.

    Their logits are left out whatever they are, but the gradient of the hidden state passes through them times zero,
    which undefined memory may turn into a number that is not finite.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name in (_EMBEDDING, _OUTPUT):
                parameter[max(0, architecture.vocab_size - rank * len(parameter)) :] = 0


def _draw(name: str, parameter: Tensor, architecture: Architecture, seed: int) -> None:
    scale = architecture.initializer_range
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        scale /= math.sqrt(2 * architecture.num_layers)
    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    axis = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
    shape = list(parameter.shape)
    if axis is not None:
        shape[axis] *= size
    padded_rows = shape[0]
    if name in (_EMBEDDING, _OUTPUT):
        shape[0] = architecture.vocab_size
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    full = torch.empty(shape, dtype=torch.float32).normal_(0.0, scale, generator=generator)
    if padded_rows > shape[0]:
        full = torch.nn.functional.pad(full, (0, 0, 0, padded_rows - shape[0]))
    if axis is not None:
        full = _slice(full, axis, size, rank, halves=2 if name.endswith("linear_fc1.weight") else 1)
    parameter.copy_(full)


def _slice(full: Tensor, axis: int, size: int, rank: int, halves: int) -> Tensor:
    """A tensor rank's part; gate and up projections stand one above the other and are split each by itself."""
    return torch.cat([half.chunk(size, axis)[rank] for half in full.chunk(halves, 0)], dim=0)

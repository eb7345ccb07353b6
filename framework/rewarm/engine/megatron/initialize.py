"""What the weights of live Megatron-Core chunks are before the first step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from rewarm.engine.megatron.transformer import Decoder
from rewarm.engine.megatron.weights import SetMain, fill_weights
from rewarm.model.architecture import Architecture
from rewarm.model.initial import RandomTensors
from rewarm.model.tensors import tensor_shapes

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


def initialize(
    chunks: Sequence[Decoder], architecture: Architecture, seed: int, set_main: SetMain | None = None
) -> None:
    """Draw every weight of this rank, holding one full tensor at a time; padded vocabulary rows are zero.

    Args:
        chunks: this rank's parts of the model.
        architecture: of the model.
        seed: of the run.
        set_main: as for :func:`rewarm.engine.megatron.weights.import_weights`.
    """
    drawn = RandomTensors(
        tensor_shapes(architecture),
        seed=seed,
        initializer_range=architecture.initializer_range,
        num_layers=architecture.num_layers,
    )
    fill_weights(chunks, architecture, drawn, set_main)


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

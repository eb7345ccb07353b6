"""The state of Megatron-Core chunks in one process, to and from Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rewarm.engine.megatron.optimizer import Optimizer
from rewarm.engine.megatron.transformer import Decoder
from rewarm.engine.megatron.weights import Place, fill_weights, places, read_shard, take_apart
from rewarm.engine.portable import MOMENTS, WEIGHT, PortableState, PortableWriter
from rewarm.errors import ensure
from rewarm.model.architecture import Architecture
from rewarm.model.tensors import tensor_shapes


@torch.no_grad()
def save_portable(folder: Path, architecture: Architecture, chunks: Sequence[Decoder], optimizer: Optimizer) -> None:
    """Write the fp32 parameters and, under AdamW, their moments into an existing empty folder."""
    writer = PortableWriter(
        folder, tensor_shapes(architecture), moments=optimizer.has_moments, steps=optimizer.num_updates
    )
    for place, values in _states(chunks, architecture, optimizer):
        for kind in writer.kinds:
            parts = take_apart(values[kind], place, architecture)
            for name, part in zip(place.names, parts, strict=True):
                writer.write(name, kind, part)
    writer.close()


@torch.no_grad()
def load_portable(folder: Path, architecture: Architecture, chunks: Sequence[Decoder], optimizer: Optimizer) -> None:
    """Fill the chunks, the fp32 parameters and the moments with what either engine wrote."""
    state = PortableState(folder)
    fill_weights(chunks, architecture, state.tensors(WEIGHT))
    for place, values in _states(chunks, architecture, optimizer):
        for kind in state.kinds:
            # Its rows that pad the vocabulary become zero, as in a run that never had another engine.
            values[kind].copy_(read_shard(state.tensors(kind), place, values[kind], architecture, rank=0))
    optimizer.num_updates = state.steps


def _states(
    chunks: Sequence[Decoder], architecture: Architecture, optimizer: Optimizer
) -> Iterator[tuple[Place, dict[str, Tensor]]]:
    """Every parameter's fp32 value and moments, as views [as the parameter]."""
    ensure(dist.get_world_size() == 1, "in more processes each would hold a part")
    masters = optimizer.masters()
    for place, parameter in places(chunks, architecture):
        master = masters[id(parameter)]
        state = optimizer.sharded.optimizer.state[master]
        views = {WEIGHT: master, **{kind: state[kind] for kind in MOMENTS}}
        yield place, {kind: value.detach().view(parameter.shape) for kind, value in views.items()}

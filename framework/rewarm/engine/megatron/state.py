"""This rank's part of the fp32 parameters and moments under Megatron-Core's distributed optimizer.

A tensor rank holds rows or columns of a parameter; the data-parallel ranks of it share out the flat buffers that hold
the parameters of a chunk, so that each updates one range of some parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from megatron.core import parallel_state
from torch import Tensor

from rewarm.engine.megatron.initialize import global_parameters
from rewarm.engine.megatron.offloaded import OffloadedOptimizer
from rewarm.engine.megatron.optimizer import Optimizer
from rewarm.engine.megatron.transformer import Decoder
from rewarm.engine.megatron.weights import Place, places, whole_shape
from rewarm.engine.state import MOMENTS, WEIGHT, StateTensor
from rewarm.errors import ensure
from rewarm.model.architecture import Architecture
from rewarm.model.tensors import EMBEDDING

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class Described:
    """A parameter of this rank."""

    name: str
    """In the whole model."""
    place: Place
    """How it is cut over the tensor ranks, and the Hugging Face tensors that it is made of."""
    parameter: Any
    """The model's."""
    first_copy: bool
    """True where this tensor rank and stage answer for it."""


def described(chunks: Sequence[Decoder], architecture: Architecture) -> Iterator[Described]:
    """Every parameter of this rank's chunks."""
    leads = parallel_state.get_tensor_model_parallel_rank() == 0
    for chunk in chunks:
        pairs = zip(global_parameters(chunk), places([chunk], architecture), strict=True)
        for (name, parameter), (place, _) in pairs:
            # The last stage has a copy of a tied embedding as its output layer.
            copied = place.names == (EMBEDDING,) and name != _EMBEDDING
            first = (leads or place.split != "whole") and not copied
            yield Described(_EMBEDDING if copied else name, place, parameter, first)


def lend(
    chunks: Sequence[Decoder], architecture: Architecture, optimizer: Optimizer, kinds: Sequence[str], *, write: bool
) -> Iterator[StateTensor]:
    """See :mod:`rewarm.engine.state`. The update must have ended. No collective.

    Args:
        chunks: this rank's parts of the model.
        architecture: what they were built from.
        optimizer: over them.
        kinds: that are lent.
        write: give what was changed back.
    """
    ensure(optimizer.has_moments or set(kinds) <= {WEIGHT}, "this update rule keeps no moments")
    owned = optimizer.sharded.model_param_gbuf_map
    found = {each.parameter: each for each in described(chunks, architecture)}
    held = [each for parameter, each in found.items() if parameter in owned]
    if isinstance(optimizer.sharded, OffloadedOptimizer):
        yield from _lend_offloaded(held, optimizer.sharded, kinds, write=write)
        return
    masters = optimizer.masters()
    for each in held:
        master = masters[id(each.parameter)]
        state = optimizer.sharded.optimizer.state[master]
        values = {WEIGHT: master, **{kind: state[kind] for kind in MOMENTS}}
        yield from _tensors(each, optimizer.sharded, {kind: values[kind].detach().view(-1) for kind in kinds})


def _lend_offloaded(
    held: Sequence[Described], sharded: OffloadedOptimizer, kinds: Sequence[str], *, write: bool
) -> Iterator[StateTensor]:
    """In the order of the offloaded state, so that what rests on a drive is read, and written, once."""
    inner = sharded.optimizer.offload.inner
    for each in sorted(held, key=lambda each: sharded.places[each.parameter]):
        number = sharded.places[each.parameter]
        values = dict(zip((WEIGHT, *MOMENTS), inner.read(number), strict=True))
        yield from _tensors(each, sharded, {kind: values[kind] for kind in kinds})
        if write:
            inner.write(number, *values.values())
    inner.settle()


def _tensors(each: Described, sharded: Any, values: dict[str, Tensor]) -> Iterator[StateTensor]:
    span = sharded._get_model_param_range_map(each.parameter)["param"]
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for kind, tensor in values.items():
        yield StateTensor(
            each.name,
            kind,
            whole_shape(each.place, each.parameter),
            tuple(each.parameter.shape),
            span.start,
            slice(0, len(tensor) if each.first_copy else 0),
            tensor,
            _cut(each.place, rank, size),
        )


def _cut(place: Place, rank: int, size: int) -> Callable[[Tensor], Tensor] | None:
    """How a tensor rank's shard is taken out of a whole parameter."""
    if place.split == "whole" or size == 1:
        return None

    def cut(whole: Tensor) -> Tensor:
        match place.split:
            case "whole":
                return whole
            case "gate_up":
                return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
            case "columns":
                return whole.chunk(size, dim=1)[rank]
            case "vocabulary" | "qkv":
                return whole.chunk(size)[rank]
        assert_never(place.split)

    return cut

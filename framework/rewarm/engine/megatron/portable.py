"""The state of a Megatron-Core model in one process, to and from Hugging Face names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rewarm.engine.megatron.state import described
from rewarm.engine.megatron.weights import read_shard, take_apart
from rewarm.engine.portable import PortableState, write_portable
from rewarm.engine.state import WEIGHT, StateTensor
from rewarm.errors import ensure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from rewarm.engine.megatron.engine import MegatronEngine
    from rewarm.engine.megatron.optimizer import Optimizer


def save_portable(folder: Path, engine: MegatronEngine, optimizer: Optimizer) -> None:
    """Write the fp32 parameters and, under an update rule that has them, their moments into an empty folder."""
    places = {each.name: each.place for each in described(engine.chunks, engine.architecture)}

    def split(each: StateTensor) -> Iterator[tuple[str, Tensor]]:
        place = places[each.name]
        parts = take_apart(each.tensor.view(each.shard_shape), place, engine.architecture)
        return zip(place.names, parts, strict=True)

    write_portable(folder, engine, split, moments=optimizer.has_moments, steps=optimizer.num_updates)


def load_portable(folder: Path, engine: MegatronEngine, optimizer: Optimizer) -> None:
    """Fill the fp32 parameters, the model and the moments with what either engine wrote."""
    ensure(engine.world_size == 1, "in more processes each would hold a part")
    portable = PortableState(folder)
    places = {each.name: each.place for each in described(engine.chunks, engine.architecture)}
    with engine.state(portable.kinds if optimizer.has_moments else (WEIGHT,), write=True) as tensors:
        for each in tensors:
            # Its rows that pad the vocabulary become zero, as in a run that never had another engine.
            target = each.tensor.view(each.shard_shape)
            whole = read_shard(portable.tensors(each.kind), places[each.name], target, engine.architecture, rank=0)
            target.copy_(whole)
    optimizer.num_updates = portable.steps

"""Which part of each parameter a tensor rank holds after AutoTP cut the model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rewarm.engine.deepspeed import compat
from rewarm.engine.deepspeed.partitions import Fragment
from rewarm.engine.deepspeed.sources import Source
from rewarm.errors import UserError


def local_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of a parameter before ZeRO cut it over the data-parallel ranks."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Shards:
    """The cut of a model over the tensor ranks.

    Args:
        module: the model, cut already.
        rank: this tensor rank.
        size: tensor ranks.

    Attributes:
        shapes: of each whole parameter by name.
        maps: how it is cut, by name, where it is.

    Raises:
        UserError: if DeepSpeed cannot describe how it cut a parameter.
    """

    def __init__(self, module: nn.Module, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.maps: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in module.named_parameters():
            try:
                found = compat.shard_map(parameter) if size > 1 else None
            except NotImplementedError as problem:
                raise UserError(
                    f"parallel.tensor={size}: DeepSpeed cuts {name} in a way that cannot be saved ({problem})",
                    fix="set parallel.tensor=1 and share memory with deepspeed.zero_stage",
                ) from problem
            if found is not None:
                self.maps[name] = found
            self.shapes[name] = local_shape(parameter) if found is None else tuple(found.logical_shape)

    def answers_for(self, name: str) -> bool:
        """True if this rank saves the parameter: what every tensor rank holds whole, the first one saves."""
        return name in self.maps or self.rank == 0

    def fill(self, fragment: Fragment, source: Source, kind: str) -> None:
        """Copy a fragment's part of a parameter, or of a moment of it, from a source."""
        target = fragment.tensors[kind]
        stop = fragment.start + len(target)
        if fragment.name not in self.maps:
            target.copy_(source.read(fragment.name, kind, fragment.start, stop))
            return
        whole = source.read(fragment.name, kind, 0, math.prod(self.shapes[fragment.name]))
        target.copy_(self.cut(fragment.name, whole)[fragment.start : stop])

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's shard of a whole parameter, both flattened."""
        found = self.maps[name]
        shard = whole.new_empty(math.prod(found.shard_shapes[self.rank]))
        source = _from_its_start(whole)
        for piece in found.pieces_by_rank[self.rank]:
            piece.dest_view(shard).copy_(piece.source_view(source))
        return shard

    def join(self, name: str, shard: Tensor) -> Tensor:
        """The whole parameter on every tensor rank from each one's shard. Collective over the tensor ranks."""
        if name not in self.maps:
            return shard.view(self.shapes[name])
        whole = torch.zeros(math.prod(self.shapes[name]), dtype=shard.dtype, device=shard.device)
        place(self.maps[name], self.rank, shard.reshape(-1), whole)
        torch.distributed.all_reduce(whole, group=compat.tensor_group())
        return whole.view(self.shapes[name])


def place(cut: Any, rank: int, shard: Tensor, whole: Tensor) -> None:
    """Put one tensor rank's shard into the whole parameter, both flattened."""
    source = _from_its_start(shard)
    for piece in cut.pieces_by_rank[rank]:
        piece.source_view(whole).copy_(piece.dest_view(source))


def _from_its_start(tensor: Tensor) -> Tensor:
    """A flat tensor whose storage begins with it: pieces count from the beginning of the storage."""
    flat = tensor.reshape(-1)
    return flat.clone() if flat.storage_offset() else flat

"""This rank's part of the fp32 parameters and moments under ZeRO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from rewarm.engine.deepspeed.partitions import Partitions
from rewarm.engine.deepspeed.shards import Shards
from rewarm.engine.state import WEIGHT, StateTensor
from rewarm.errors import ensure


def lend(partitions: Partitions, shards: Shards, kinds: Sequence[str], *, write: bool) -> Iterator[StateTensor]:
    """See :mod:`rewarm.engine.state`. No collective.

    Args:
        partitions: where ZeRO keeps the state.
        shards: the cut over the tensor ranks.
        kinds: that are lent.
        write: give what was changed back.
    """
    moments = any(kind != WEIGHT for kind in kinds)
    ensure(partitions.has_moments or not moments, "this update rule keeps no moments")
    spans = partitions.spans()
    for fragment in partitions.fragments(moments=moments, change=write):
        name = fragment.name
        first, length = spans.get(name, (fragment.start, 0))
        begin = first - fragment.start
        owned = slice(begin, begin + length if shards.answers_for(name) else begin)
        shape = shards.shapes[name]
        cut = (lambda whole, name=name: shards.cut(name, whole.contiguous())) if name in shards.maps else None
        shard_shape = tuple(shards.maps[name].shard_shapes[shards.rank]) if name in shards.maps else shape
        for kind in kinds:
            tensor = fragment.tensors[kind]
            ensure(fragment.start + len(tensor) <= math.prod(shard_shape), f"{name} is longer than its shard")
            yield StateTensor(name, kind, shape, shard_shape, fragment.start, owned, tensor, cut)


def named(each: StateTensor) -> list[tuple[str, Tensor]]:
    """A parameter that is lent whole, by its Hugging Face name, which is the engine's own."""
    return [(each.name, each.tensor.view(each.shard_shape))]

"""The parts of an engine's own tensors that make up each subgroup.

An engine's parameters and gradients lie where the engine wants them. The executor works on views of them, cut where
the flat state is cut, so that no second copy of a rank's parameters and gradients is held on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rewarm.errors import ensure
from rewarm.offload.runtime.slabs import StateLayout


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a part of a subgroup lies in its shard."""

    shard: int
    """Index of the shard."""
    offset: int
    """First element within the shard."""
    start: int
    """First element, counted from the start of the subgroup."""
    stop: int
    """One past the last element."""
    group: int
    """Parameter group."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a subgroup and the engine's tensor that it stands for."""

    start: int
    """First element, counted from the start of the subgroup."""
    stop: int
    """One past the last element."""
    group: int
    """Parameter group."""
    tensor: torch.Tensor
    """The engine's elements, [stop - start]."""

    @property
    def span(self) -> slice:
        """The elements within an array of the subgroup."""
        return slice(self.start, self.stop)


class Pieces:
    """Views of an engine's tensors by subgroup; gaps between shards belong to none.

    Attributes:
        dtype, device: of all tensors.
        tensors: flat, one per shard of the layout.
    """

    def __init__(self, layout: StateLayout, tensors: Sequence[torch.Tensor] | torch.Tensor) -> None:
        """Cut.

        Args:
            layout: the flat state.
            tensors: a flat tensor per shard; or one tensor [layout.numel] that is laid out like the state itself.
        """
        if isinstance(tensors, torch.Tensor):
            ensure(tensors.numel() == layout.numel, "a flat tensor of another length than the layout")
            tensors = [layout.view(tensors, i) for i in range(len(layout.shards))]
        for tensor, shard in zip(tensors, layout.shards, strict=True):
            ensure(tensor.dim() == 1 and tensor.numel() == shard.numel and tensor.is_contiguous(), shard.name)
            ensure(tensor.dtype == tensors[0].dtype, f"{shard.name} is {tensor.dtype}, the others {tensors[0].dtype}")
        self.tensors = list(tensors)
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        self._pieces = [[_view(cut, tensors[cut.shard]) for cut in cuts] for cuts in cut_layout(layout)]

    def of(self, subgroup: int) -> list[Piece]:
        """The pieces of a subgroup, in order."""
        return self._pieces[subgroup]

    def gather(self, subgroup: int, target: torch.Tensor) -> torch.Tensor:
        """Fill an array [length of the subgroup] with the engine's values, and return it."""
        for piece in self.of(subgroup):
            target[piece.span].copy_(piece.tensor)
        return target


def _view(cut: Cut, tensor: torch.Tensor) -> Piece:
    return Piece(cut.start, cut.stop, cut.group, tensor.narrow(0, cut.offset, cut.stop - cut.start))


def cut_layout(layout: StateLayout) -> list[list[Cut]]:
    """The cuts of every subgroup, in order."""
    found: list[list[Cut]] = [[] for _ in range(layout.subgroups)]
    for i, (shard, first) in enumerate(zip(layout.shards, layout.offsets, strict=True)):
        for subgroup in layout.subgroups_of(i):
            start, stop = layout.bounds(subgroup)
            left, right = max(first, start), min(first + shard.numel, stop)
            found[subgroup].append(Cut(i, left - first, left - start, right - start, shard.group))
    return found

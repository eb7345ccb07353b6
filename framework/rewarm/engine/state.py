"""One view of an engine's state: this rank's fp32 parameters and moments, whatever the engine and wherever they rest.

:meth:`rewarm.engine.base.Engine.state` lends them one after the other::

    with engine.state(write=True) as tensors:
        for each in tensors:
            each.tensor.mul_(0.99)

What is lent is this rank's part: a tensor rank's shard of a parameter, and of its flattened elements the range that
this rank updates. The rules:

* Entering and leaving are collective. In between there must be no collective: ranks hold different tensors.
* A tensor is lent until the next one is asked for. Pieces that rest on a drive, in 8 bits or in DeepSpeed's swap are
  read for that long, and written back if ``write`` is set. Without ``write`` a tensor must not be changed.
* Elements that several ranks hold are lent to each of them, and each must write the same values there, as a function
  of the element and of what the ranks share does. :attr:`StateTensor.owned` covers every element on one rank only:
  sums over the model and files take those.
* After a write the model's 16-bit copies are the rounded fp32 parameters, on every rank.
* Vocabulary rows that are padding are part of the tensors. They are zero and have to stay it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewarm.engine import device, ranks

if TYPE_CHECKING:
    from rewarm.engine.base import Engine

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A rank's part of one parameter, or of one of its moments."""

    name: str
    """Of the parameter in the whole model, as the engine's checkpoints have it: layers count from 0 over all stages."""
    kind: str
    """``weight``, ``exp_avg`` or ``exp_avg_sq``."""
    global_shape: tuple[int, ...]
    """Of the whole parameter, with the rows that pad a vocabulary."""
    shard_shape: tuple[int, ...]
    """Of the tensor rank's part of it."""
    start: int
    """The first element that is lent, in the flattened shard."""
    owned: slice
    """The elements of ``tensor`` that this rank answers for; over all ranks every element of the model is there once.
    Empty where another rank does."""
    tensor: Tensor
    """fp32 [n]; a view of the state, or a copy on the host that is written back."""
    cut: Callable[[Tensor], Tensor] | None = None
    """Takes this tensor rank's shard out of a whole parameter; None where they are the same."""

    @property
    def key(self) -> str:
        """Name and kind: unique on a rank, and the same wherever this part of the state lies."""
        return f"{self.name}/{self.kind}"

    def part_of(self, whole: Tensor) -> Tensor:
        """The elements of a whole tensor [global_shape] that this one stands for: [n]."""
        shard = whole if self.cut is None else self.cut(whole)
        return shard.reshape(-1)[self.start : self.start + len(self.tensor)]

    def indices(self) -> Tensor:
        """int64 [n]; where each element lies in the flattened whole parameter."""
        return self.part_of(torch.arange(math.prod(self.global_shape)).view(self.global_shape))


Lent = AbstractContextManager[Iterator[StateTensor]]
"""What :meth:`rewarm.engine.base.Engine.state` returns: a block in which the tensors are lent."""


@contextmanager
def lending(tensors: Iterator[StateTensor], publish: Callable[[], None] | None) -> Iterator[Iterator[StateTensor]]:
    """The block in which an engine lends its state.

    Args:
        tensors: gives each piece back when asked for the next one.
        publish: takes what was written over into the model and to every rank. Collective; None if nothing is written.
    """
    with torch.no_grad():
        yield tensors
        for _ in tensors:  # a loop that ended early has one piece still to give back
            pass
        if publish is not None:
            publish()


def snapshot(engine: Engine, kinds: Sequence[str] = (WEIGHT,)) -> dict[str, Tensor]:
    """Copies of this rank's state on the host, fp32 [n] by :attr:`StateTensor.key`. Collective."""
    with engine.state(kinds) as tensors:
        return {each.key: each.tensor.to("cpu", copy=True) for each in tensors}


def interpolate(engine: Engine, saved: Mapping[str, Tensor], rate: float, *, save: bool = False) -> None:
    """Move the fp32 parameters to ``saved + rate * (parameters - saved)``. Collective.

    Args:
        engine: whose moments stay as they are.
        saved: of :func:`snapshot`, under the same layout.
        rate: 1 changes nothing, 0 gives the saved values.
        save: put the new parameters into ``saved``, in the same pass.
    """
    with engine.state(write=True) as tensors:
        for each in tensors:
            before = saved[each.key]
            each.tensor.copy_(torch.lerp(before.to(each.tensor.device), each.tensor, rate))
            if save:
                before.copy_(each.tensor)


def squared_distance(engine: Engine, saved: Mapping[str, Tensor]) -> float:
    """Sum over the whole model of ``(parameters - saved) ** 2``, in float64; equal on every rank. Collective.

    Args:
        engine: whose fp32 parameters are compared.
        saved: of :func:`snapshot`, under the same layout.
    """
    total = torch.zeros((), dtype=torch.float64)
    with engine.state() as tensors:
        for each in tensors:
            here, there = each.tensor[each.owned].double(), saved[each.key][each.owned]
            total += (here - there.to(here)).square().sum().cpu()
    return float(ranks.sum_over_ranks(total.to(device.local_device())))

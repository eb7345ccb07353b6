"""The offloaded state of a rank that updates nothing, so that whoever steps need not ask whether there is any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rewarm.offload.planning.routes import Placement
from rewarm.offload.planning.simulate import Timeline
from rewarm.offload.runtime.execute import GroupStep
from rewarm.offload.runtime.optimizer import OffloadedAdamW


class EmptyAdamW(OffloadedAdamW):
    """:class:`OffloadedAdamW` over no shards: every step ends at once, and no task of it is timed."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.timeline = None
        self._begun = False

    def step(
        self, number: int, gradients: Sequence[Tensor], groups: Sequence[GroupStep], grad_scale: float = 1.0
    ) -> Timeline:
        """A step without tasks."""
        return Timeline((), (), ())

    def begin(self, number: int, gradients: Sequence[Tensor], groups: Sequence[GroupStep]) -> None:
        """Note that a step has begun."""
        self._begun = True

    def ready(self, shard: int, event: Any = None) -> None:
        """Refuse a gradient: no shard has one."""
        raise AssertionError("no gradient is waited for on a rank without shards")

    def release(self, grad_scale: float = 1.0) -> None:
        """Note that the step has ended."""
        self._begun = False

    @property
    def begun(self) -> bool:
        """True between :meth:`begin` and :meth:`release`."""
        return self._begun

    @property
    def updating(self) -> bool:
        """False: no update ever runs."""
        return False

    def wait_gradients(self) -> None:
        """Return at once: no gradient is read."""

    def finish(self) -> Timeline | None:
        """Note that the step has ended."""
        self._begun = False
        return None

    def settle(self) -> None:
        """Note that the step has ended; there is nothing to put back."""
        self.finish()

    def device_bytes(self) -> int:
        """0."""
        return 0

    def place(self, placement: Placement) -> None:
        """Take over the placement, which has no subgroups."""
        self.placement = placement

    def close(self) -> None:
        """Return at once: no thread, memory or file is held."""

"""Optimizer offload as the engines use it: this rank's state, stepped where :mod:`rewarm.engine.placement` puts it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewarm.config.offload import OffloadConfig
from rewarm.engine import ranks
from rewarm.engine.placement import Placer
from rewarm.errors import UserError
from rewarm.kernels import adamw, native
from rewarm.kernels.blocks import QUANTIZED_BLOCK
from rewarm.offload.planning.routes import Job, Placement
from rewarm.offload.runtime.device import Device, open_device
from rewarm.offload.runtime.empty import EmptyAdamW
from rewarm.offload.runtime.execute import GroupStep
from rewarm.offload.runtime.optimizer import OffloadedAdamW, Resources, layout_of
from rewarm.offload.runtime.slabs import ALIGNMENT, HostPool, aligned

log = logging.getLogger(__name__)


class Offload:
    """This rank's optimizer state under the ``offload`` section of a run. Every method is collective.

    Attributes:
        inner: the state and its update; an :class:`~rewarm.offload.runtime.empty.EmptyAdamW` on a rank that updates
            nothing.
        placer: chooses where the state is kept.
    """

    def __init__(
        self,
        settings: OffloadConfig,
        names: Sequence[str],
        shards: Sequence[Tensor],
        groups: Sequence[int],
        *,
        gradient_type: torch.dtype,
        masters: Sequence[Tensor] | None = None,
        eight_bit: bool = False,
    ) -> None:
        """Place the state, with moments of zero.

        Args:
            settings: of the run; with mode none all state stays on the device.
            names, shards, groups, masters: see :class:`~rewarm.offload.runtime.optimizer.OffloadedAdamW`; none at all
                on a rank that updates nothing.
            gradient_type: of the gradients that :meth:`step` is given.
            eight_bit: keep the moments as one byte each.

        Raises:
            UserError: on every rank, if memory, a drive or the profile does not serve.
        """
        size = aligned(settings.subgroup_size, QUANTIZED_BLOCK if eight_bit else ALIGNMENT)
        self.settings = settings.model_copy(update={"subgroup_size": size})
        self._device: Device = ranks.on_every_rank(lambda: open_device(settings.stand_in, required=False))
        layout = layout_of(names, shards, groups, size, eight_bit=eight_bit) if shards else None
        self._subgroups = 0 if layout is None else layout.subgroups
        numel = 0 if layout is None else layout.numel
        widths = {"grad_bytes": gradient_type.itemsize, "param_bytes": shards[0].dtype.itemsize if shards else 4}
        job = Job(numel, 1e-6, 1e-6, eight_bit=eight_bit, **widths)
        self.placer = Placer(self.settings, self._device, job, self._subgroups)
        placement = self.placer.choose()
        self._pool = HostPool(pin=self._device.pins, limit=self.placer.machine.host_free, node=self._device.node)

        def build() -> OffloadedAdamW:
            if not shards:
                return EmptyAdamW(placement)
            self._check_kernels(placement)
            resources = self._resources(gradient_type)
            return OffloadedAdamW(
                names, shards, groups, placement, job, self._device, resources, subgroup_size=size, masters=masters
            )

        self.inner: OffloadedAdamW = ranks.on_every_rank(build)

    def step(
        self, number: int, gradients: Sequence[Tensor], groups: Sequence[GroupStep], grad_scale: float = 1.0
    ) -> None:
        """Update this rank's shards; see :meth:`~rewarm.offload.runtime.optimizer.OffloadedAdamW.step`.

        Under mode auto the time is compared with the prediction, and the state is placed again where they differ.
        """
        self.inner.step(number, gradients, groups, grad_scale)
        self._compare()

    def release(self, grad_scale: float = 1.0) -> None:
        """Let a step that :attr:`inner` has begun update, beside what follows; :meth:`step` has the rest."""
        self.inner.release(grad_scale)
        self._compare()

    def finish(self) -> None:
        """Wait for a step that was released; one that was only begun is undone.

        Raises:
            Exception: on every rank, if the update failed on one of them.
        """
        ranks.on_every_rank(self.inner.finish)

    def profiled(self, seconds: float, peak: float, hides: tuple[float, float, int] | None = None) -> None:
        """Place the state again, now that a step's memory and time are known.

        Args:
            seconds: of the forward and backward passes of one step.
            peak: most bytes that were allocated on the device in them; without a GPU it is not looked at.
            hides: seconds of one forward and of one backward pass, and passes in a step, where the update runs beside
                the last backward pass and the next forward pass; None where both wait for it.
        """
        placement = self.placer.profiled(seconds, peak, self.inner.device_bytes(), hides)
        if placement is not None:
            self._place(placement)
        if self._subgroups:
            described = self.inner.placement.describe() + (", 8-bit moments" if self.placer.job.eight_bit else "")
            log.info("optimizer state: %s, in %d subgroups", described, self._subgroups)

    def close(self) -> None:
        """End the threads and give memory and files back. Not collective."""
        self.inner.close()
        self._pool.close()

    def _compare(self) -> None:
        """Compare the last step that has ended with the prediction, and place the state again where they differ."""
        timeline = self.inner.timeline
        if self.placer.has_drifted(timeline):
            self._place(self.placer.calibrate(self.inner.placement, timeline))

    def _resources(self, gradient_type: torch.dtype) -> Resources:
        paths, local = [Path(path) for path in self.settings.nvme_paths], self.placer.local
        return Resources(self._pool, gradient_type, paths, self.placer.nvme_rates, local.threads, local.cores)

    def _place(self, placement: Placement) -> None:
        def move() -> None:
            if not self.inner.placement.same_as(placement):
                self._check_kernels(placement)
                self.inner.place(placement)

        ranks.on_every_rank(move)

    def _check_kernels(self, placement: Placement) -> None:
        where = self._device.torch_device
        if self.placer.job.eight_bit and not adamw.runs_on(torch.device("cpu")):
            raise UserError(
                "optimizer.name=adamw_8bit needs the compiled library, which is missing",
                fix=f"{native.REBUILD}; or set optimizer.name=adamw",
            )
        if any(route.on_device for route in placement.routes) and not adamw.runs_on(where) and where.type == "cuda":
            raise UserError(
                f"offload.mode={self.settings.mode} updates on the GPU, and {native.why_no_cuda()}",
                fix=f"{native.REBUILD}, with nvcc installed; or set offload.mode=cpu",
            )

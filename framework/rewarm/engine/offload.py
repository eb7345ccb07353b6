"""Optimizer offload as the engines use it: from the run's settings to a placement on which a node's ranks agree."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rewarm.config.offload import OffloadConfig
from rewarm.engine import ranks
from rewarm.errors import UserError
from rewarm.kernels import adamw, native
from rewarm.kernels.blocks import QUANTIZED_BLOCK
from rewarm.offload.planning.pipeline import predict
from rewarm.offload.planning.placement import interleave
from rewarm.offload.planning.plan import Drift, calibrated, choose, plan, update_seconds
from rewarm.offload.planning.routes import Job, Machine, Placement
from rewarm.offload.planning.simulate import Timeline
from rewarm.offload.runtime import profile
from rewarm.offload.runtime.cores import divide
from rewarm.offload.runtime.device import Device, open_device
from rewarm.offload.runtime.execute import GroupStep
from rewarm.offload.runtime.optimizer import Means, OffloadedAdamW, layout_of
from rewarm.offload.runtime.slabs import ALIGNMENT, HostPool, aligned

log = logging.getLogger(__name__)

_Value = TypeVar("_Value")
_RESERVE = 0.05
"""Part of the device's memory that is left alone: evaluation and fragmentation take more than a rehearsed step."""

_MATTERS = 0.01
"""Part of a step's time by which an update must miss its prediction before state is moved for it."""


@dataclass(frozen=True, slots=True)
class Seat:
    """What one rank tells the others before anything is placed."""

    node: str
    cores: tuple[int, ...]
    numa_node: int | None
    """Of its GPU."""
    host_free: float
    device_free: float
    parameters: int
    """Of the flat state, 0 on a rank that updates nothing."""


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's share of its node."""

    index: int
    """This rank among those of the node."""
    ranks: int
    threads: int
    """Of the CPU's update."""
    cores: tuple[int, ...] | None
    """That they are pinned to; None where ranks outnumber cores."""


class Offload:
    """This rank's optimizer state under the ``offload`` section of a run. Every method is collective.

    Attributes:
        inner: the state and its update; None on a rank that updates nothing.
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
        self._device: Device = _together(lambda: open_device(settings.stand_in, required=False))
        layout = layout_of(names, shards, groups, size, eight_bit=eight_bit) if shards else None
        self._subgroups = 0 if layout is None else layout.subgroups
        param_bytes = shards[0].dtype.itemsize if shards else 4
        numel = 0 if layout is None else layout.numel
        grad_bytes = gradient_type.itemsize
        self._job = Job(numel, 1e-6, 1e-6, grad_bytes=grad_bytes, param_bytes=param_bytes, eight_bit=eight_bit)
        cores = tuple(sorted(os.sched_getaffinity(0)))
        seat = Seat(platform.node(), cores, self._device.node, profile.available_memory(), self._device_free(), numel)
        self._seats: list[Seat] = ranks.gather(seat)
        self._node = [rank for rank, other in enumerate(self._seats) if other.node == seat.node]
        self.share = self._share()
        self._machine = self._measure()
        self._drift: Drift | None = None
        self._late, self._steps, self._beside, self._overlaps = False, 0, 0.0, False
        self._room = self._machine.device_free
        if self._open_ended:
            # Until a step was rehearsed, only the buffers that state passes through are counted on.
            buffers = self._job.state_bytes() * settings.slots * size
            self._machine = replace(self._machine, device_free=min(self._room, buffers))
        placement = self._choose()
        self.inner: OffloadedAdamW | None = None
        self._pool = HostPool(pin=self._device.pins, limit=self._machine.host_free, node=self._device.node)

        def build() -> OffloadedAdamW | None:
            if layout is None:
                return None
            self._check_kernels(placement)
            means = self._means(gradient_type)
            return OffloadedAdamW(
                names, shards, groups, placement, self._job, self._device, means, subgroup_size=size, masters=masters
            )

        self.inner = _together(build)

    def step(
        self, number: int, gradients: Sequence[Tensor], groups: Sequence[GroupStep], grad_scale: float = 1.0
    ) -> None:
        """Update this rank's shards; see :meth:`~rewarm.offload.runtime.optimizer.OffloadedAdamW.step`.

        Under mode auto the time is held against the prediction, and the state is placed again where they have parted.
        """
        if self.inner is not None:
            self.inner.step(number, gradients, groups, grad_scale)
        self._watch()

    def release(self, grad_scale: float = 1.0) -> None:
        """Let a step that :attr:`inner` has begun update, beside what follows; :meth:`step` has the rest."""
        if self.inner is not None:
            self.inner.release(grad_scale)
        self._watch()

    def finish(self) -> None:
        """Wait for a step that was released; one that was only begun is undone.

        Raises:
            Exception: on every rank, if the update failed on one of them.
        """
        _together(lambda: None if self.inner is None else self.inner.finish())

    def _watch(self) -> None:
        """Hold the last step that has ended against the prediction."""
        timeline = None if self.inner is None else self.inner.timeline
        if self.settings.mode != "auto":
            return
        self._steps += 1
        if timeline is not None and self._drift is not None:
            expected, seconds = self._drift.predicted, update_seconds(timeline)
            matters = abs(seconds - expected) > _MATTERS * self._beside
            self._late |= self._drift.observe(seconds if matters else expected)
        # Every rank comes here in the same step, so that none waits for a decision of another in between.
        if self._steps % Drift.patience == 0 and ranks.any_rank(self._late):
            self._replan(timeline)
            self._late = False

    def rehearsed(self, seconds: float, peak: float, hides: tuple[float, float, int] | None = None) -> None:
        """Place the state again, now that a step's memory and time are known.

        Args:
            seconds: of the forward and backward passes of one step.
            peak: most bytes that were allocated on the device in them; without a GPU it is not looked at.
            hides: seconds of one forward and of one backward pass, and passes in a step, where the update runs beside
                the last backward pass and the next forward pass; None where both wait for it.
        """
        self._beside = seconds
        self._overlaps = hides is not None
        if hides is not None:
            forward, backward, passes = hides
            self._job = replace(self._job, forward=forward, backward=backward, micro_batches=passes)
        if self._open_ended:
            room = self._room
            if self._device.torch_device.type == "cuda":
                free, total = torch.cuda.mem_get_info()
                others = total - free - torch.cuda.memory_reserved()
                held = 0 if self.inner is None else self.inner.states.device_bytes()
                room = max(0.0, (1 - _RESERVE) * total - others - peak + held)
                room = min(ranks.gather(room)[rank] for rank in self._node)
            self._machine = replace(self._machine, device_free=room)
        if hides is not None:
            # Slots are held for good, so that those there are may be filled in the backward pass.
            self._machine = replace(self._machine, device_free_backward=self._machine.device_free)
        if self._open_ended or (hides is not None and self.settings.mode == "auto"):
            self._place(self._choose())
        if self.inner is not None:
            described = self.inner.placement.describe() + (", 8-bit moments" if self._job.eight_bit else "")
            log.info("optimizer state: %s, in %d subgroups", described, self._subgroups)

    def close(self) -> None:
        """End the threads and give memory and files back. Not collective."""
        if self.inner is not None:
            self.inner.close()
        self._pool.close()

    def _means(self, gradient_type: torch.dtype) -> Means:
        paths, share = [Path(path) for path in self.settings.nvme_paths], self.share
        return Means(self._pool, gradient_type, paths, self._drive_shares, share.threads, share.cores)

    @property
    def _open_ended(self) -> bool:
        """True if what a step leaves free on the device decides how much state stays there."""
        settings = self.settings
        chosen_here = settings.mode == "auto" or (settings.mode == "twinflow" and settings.resident_fraction is None)
        return chosen_here and settings.device_memory is None

    def _device_free(self) -> float:
        if self._device.torch_device.type != "cuda":
            return profile.available_memory()
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + cached)

    def _share(self) -> Share:
        index = self._node.index(torch.distributed.get_rank())
        seats = [self._seats[rank] for rank in self._node]
        mine = divide([each.cores for each in seats], [each.numa_node for each in seats])[index]
        # Without a GPU the model is computed on the same cores: the update may take them all, and wherever they are.
        pinned = mine if mine and self._device.pins else None
        return Share(index, len(self._node), self.settings.cpu_threads or max(1, len(mine) - 1), pinned)

    def _measure(self) -> Machine:
        """This rank's share of its node; rates only where a placement is computed from them."""
        settings, node = self.settings, [self._seats[rank] for rank in self._node]
        host = 0.8 * min(seat.host_free for seat in node) / len(node)
        if settings.host_memory is not None:
            host = settings.host_memory * 1e9
        room = min(seat.device_free for seat in node)
        if self._device.torch_device.type != "cuda":
            room = 0.8 * room / len(node)
        if settings.device_memory is not None:
            room = settings.device_memory * 1e9
        _together(lambda: profile.check_drives(settings.nvme_paths))
        space = free_space(settings.nvme_paths) / len(node)
        self._drive_shares: list[float] | None = None
        if settings.mode == "auto" or len(settings.nvme_paths) > 1 or settings.profile is not None:
            measured = self._profile()
            drives = [measured.nvme[str(Path(path))] for path in settings.nvme_paths]
            self._drive_shares = [min(drive["read"], drive["write"]) for drive in drives] or None
            size, eight_bit = settings.subgroup_size, self._job.eight_bit
            machine = measured.machine(
                ranks=len(node), host_memory=host, device_free=room, size=size, eight_bit=eight_bit
            )
            return replace(machine, nvme_free=space)
        machine = replace(_UNMEASURED, host_free=host, device_free=room, nvme_free=space)
        return replace(machine, nvme_read=1.0, nvme_write=1.0) if settings.nvme_paths else machine

    def _profile(self) -> profile.Profile:
        """The profile of this node, read or measured by its first rank while the others wait."""
        found = _together(self._read_or_measure) if self.share.index == 0 else _together(lambda: None)
        profiles = ranks.gather(found)
        chosen: profile.Profile = profiles[self._node[0]]
        return chosen

    def _read_or_measure(self) -> profile.Profile:
        paths = [Path(path) for path in self.settings.nvme_paths]
        fingerprint, _ = profile.describe(self._device, self.share.threads, paths)
        path = Path(self.settings.profile or profile.cache_path(fingerprint))
        if self.settings.profile is not None or path.exists():
            return profile.load(path, fingerprint)
        log.info("measuring this machine for offload.mode=%s, about 20 s", self.settings.mode)
        measured = profile.measure(self._device, threads=self.share.threads, nvme_paths=paths, device_free=0.0)
        measured.save(path)
        return measured

    def _choose(self) -> Placement:
        """The placement of this rank's subgroups; under mode auto its node's first rank decides for all of them."""
        if self.settings.mode != "auto":
            count = self._subgroups
            return _together(lambda: choose(self.settings, self._machine, self._job) if count else Placement(()))
        placement, seconds = self._decide()
        self._drift = Drift(seconds)
        return stretched(placement, self._subgroups)

    def _decide(self) -> tuple[Placement, float]:
        """The placement of this rank's node, and the seconds that its updates should take."""
        job = replace(self._job, parameters=max(1, *(self._seats[rank].parameters for rank in self._node)))
        beside = 0.0 if self._overlaps else self._beside

        def decide() -> tuple[Placement, float]:
            placement = plan(self.settings, self._machine, job, beside).placement
            return placement, update_seconds(predict(self._machine, job, placement))

        mine = _together(lambda: decide() if self.share.index == 0 else None)
        decided: tuple[Placement, float] = ranks.gather(mine)[self._node[0]]
        return decided

    def _replan(self, timeline: Timeline | None) -> None:
        """Place again by the rates that the last step saw; if nothing changes, what is measured is expected."""
        machine = self._machine
        if timeline is not None and self.inner is not None:
            machine = calibrated(machine, self._job, self.inner.placement, timeline)
        machines: list[Machine] = ranks.gather(machine)
        slowest = {
            name: min(getattr(machines[rank], name) for rank in self._node) for name in machine.as_dict()
        }  # the ranks of a node share what is slow
        self._machine = Machine(**slowest)
        placement = self._choose()
        before = None if self.inner is None else self.inner.placement
        self._place(placement)
        measured = 0.0 if timeline is None else update_seconds(timeline)
        if before is not None and before.renamed("") == placement.renamed(""):
            self._drift = Drift(measured)
            log.info("updates take %.3f s, not as predicted; the placement is still the best", measured)
        elif before is not None:
            log.info("updates took %.3f s: from %s to %s", measured, before.describe(), placement.describe())

    def _place(self, placement: Placement) -> None:
        def move() -> None:
            if self.inner is not None and self.inner.placement.renamed("") != placement.renamed(""):
                self._check_kernels(placement)
                self.inner.place(placement)

        _together(move)

    def _check_kernels(self, placement: Placement) -> None:
        where = self._device.torch_device
        if self._job.eight_bit and not adamw.runs_on(torch.device("cpu")):
            raise UserError(
                "optimizer.name=adamw_8bit needs the compiled library, which is missing",
                fix=f"{native.REBUILD}; or set optimizer.name=adamw",
            )
        if any(route.on_device for route in placement.routes) and not adamw.runs_on(where) and where.type == "cuda":
            raise UserError(
                f"offload.mode={self.settings.mode} updates on the GPU, and {native.why_no_cuda()}",
                fix=f"{native.REBUILD}, with nvcc installed; or set offload.mode=cpu",
            )


def stretched(placement: Placement, subgroups: int) -> Placement:
    """A placement with the same shares of the routes for another number of subgroups."""
    given = len(placement.routes)
    if given == subgroups:
        return placement
    counts, done = {}, 0
    kinds = list(dict.fromkeys(placement.routes))
    for i, route in enumerate(kinds):
        taken = sum(placement.count(kind) for kind in kinds[: i + 1])
        counts[route] = round(taken * subgroups / given) - done
        done += counts[route]
    early = round(placement.early * subgroups / given)
    return replace(placement, routes=interleave(counts), early=early)


def free_space(paths: Sequence[str]) -> float:
    """Bytes that this user may still write to the drives of some folders; a drive of several counts once."""
    drives = {os.stat(path).st_dev: os.statvfs(path) for path in paths}
    return float(sum(found.f_bavail * found.f_frsize for found in drives.values()))


def _together(action: Callable[[], _Value]) -> _Value:
    """Do something on every rank; what goes wrong on one is raised on all. Collective."""
    error: Exception | None = None
    found: list[_Value] = []
    try:
        found.append(action())
    except Exception as caught:
        error = caught
    ranks.raise_on_every_rank(error)
    return found[0]


_UNMEASURED = Machine(
    h2d=1.0, d2h=1.0, duplex=2.0, dram=1.0, cpu_rate=1.0, device_rate=1.0, device_free=0.0, host_free=0.0
)
"""Of a mode that names its routes, only the memory counts."""

"""Where the ranks of a node keep their optimizer state: what each of them has, what was measured, and what follows."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rewarm.config.offload import OffloadConfig
from rewarm.engine import ranks
from rewarm.offload.planning.pipeline import predict
from rewarm.offload.planning.placement import interleave
from rewarm.offload.planning.plan import Drift, calibrated, choose, plan, update_seconds
from rewarm.offload.planning.routes import Job, Machine, Placement
from rewarm.offload.planning.simulate import Timeline
from rewarm.offload.runtime import profile
from rewarm.offload.runtime.cores import divide
from rewarm.offload.runtime.device import Device

log = logging.getLogger(__name__)

_RESERVE = 0.05
"""Part of the device's memory that is left alone: evaluation and fragmentation take more than a profiled step."""

_MATTERS = 0.01
"""Part of a step's time by which an update must miss its prediction before state is moved for it."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """What one rank tells the others before anything is placed."""

    node: str
    cores: tuple[int, ...]
    numa_node: int | None
    """Of its GPU."""
    host_free: float
    """Bytes of host memory that are free on its node."""
    device_free: float
    """Bytes of memory that are free on its device."""
    parameters: int
    """Of the flat state, 0 on a rank that updates nothing."""


@dataclass(frozen=True, slots=True)
class LocalRank:
    """This rank among those of its node."""

    index: int
    count: int
    """Ranks of the node."""
    threads: int
    """Of the CPU's update."""
    cores: tuple[int, ...] | None
    """That they are pinned to; None where ranks outnumber cores."""


class Placer:
    """Measures a node and chooses where its ranks keep their state. Every method is collective.

    Attributes:
        job: what this rank updates in each step.
        machine: this rank's part of the node.
        local: this rank among those of its node.
        nvme_rates: bytes/s of each NVMe folder, by which they share the state; None for equal parts.
    """

    def __init__(self, settings: OffloadConfig, device: Device, job: Job, subgroups: int) -> None:
        """Learn what each rank has, and measure where a placement is computed from it.

        Args:
            settings: of the run.
            device: that the state is updated for.
            job: what this rank updates; its times are not known yet.
            subgroups: number of them on this rank, 0 on one that updates nothing.

        Raises:
            UserError: on every rank, if a drive or the profile does not serve.
        """
        self.settings, self.job = settings, job
        self._device, self._subgroups = device, subgroups
        cores = tuple(sorted(os.sched_getaffinity(0)))
        own = RankInfo(
            platform.node(), cores, device.node, profile.available_memory(), _device_free(device), job.parameters
        )
        self._ranks: list[RankInfo] = ranks.gather(own)
        self._node = [rank for rank, other in enumerate(self._ranks) if other.node == own.node]
        self.local = self._local_rank()
        self.nvme_rates: list[float] | None = None
        self.machine = self._measure()
        self._drift: Drift | None = None
        self._drifted, self._steps = False, 0
        self._step_seconds, self._overlaps = 0.0, False
        self._device_memory = self.machine.device_free
        if self._open_ended:
            # Until a step was profiled, only the buffers that state passes through are counted on.
            buffers = job.state_bytes() * settings.slots * settings.subgroup_size
            self.machine = replace(self.machine, device_free=min(self._device_memory, buffers))

    def choose(self) -> Placement:
        """The placement of this rank's subgroups; under mode auto its node's first rank decides for all of them.

        Raises:
            UserError: on every rank, if memory does not serve.
        """
        if self.settings.mode != "auto":
            count = self._subgroups
            return ranks.on_every_rank(
                lambda: choose(self.settings, self.machine, self.job) if count else Placement(())
            )
        placement, seconds = self._decide()
        self._drift = Drift(seconds)
        return stretched(placement, self._subgroups)

    def profiled(
        self, seconds: float, peak: float, held: float, hides: tuple[float, float, int] | None
    ) -> Placement | None:
        """The placement now that a step's memory and time are known; None if they do not change it.

        Args:
            seconds, peak, hides: see :meth:`rewarm.engine.offload.Offload.profiled`.
            held: bytes of the device that the state takes now.
        """
        self._step_seconds = seconds
        self._overlaps = hides is not None
        if hides is not None:
            forward, backward, passes = hides
            self.job = replace(self.job, forward=forward, backward=backward, micro_batches=passes)
        if self._open_ended:
            memory = self._device_memory
            if self._device.torch_device.type == "cuda":
                free, total = torch.cuda.mem_get_info()
                others = total - free - torch.cuda.memory_reserved()
                memory = max(0.0, (1 - _RESERVE) * total - others - peak + held)
                memory = min(ranks.gather(memory)[rank] for rank in self._node)
            self.machine = replace(self.machine, device_free=memory)
        if hides is not None:
            # Slots are held for good, so that those there are may be filled in the backward pass.
            self.machine = replace(self.machine, device_free_backward=self.machine.device_free)
        if self._open_ended or (hides is not None and self.settings.mode == "auto"):
            return self.choose()
        return None

    def has_drifted(self, timeline: Timeline | None) -> bool:
        """True, on every rank, if on one of them the last steps did not take the time that was predicted.

        Args:
            timeline: of the last step that has ended on this rank; None if none has, or there is nothing to update.
        """
        if self.settings.mode != "auto":
            return False
        self._steps += 1
        if timeline is not None and self._drift is not None:
            expected, seconds = self._drift.predicted, update_seconds(timeline)
            matters = abs(seconds - expected) > _MATTERS * self._step_seconds
            self._drifted |= self._drift.observe(seconds if matters else expected)
        # Every rank comes here in the same step, so that none waits for a decision of another in between.
        if self._steps % Drift.patience == 0 and ranks.any_rank(self._drifted):
            self._drifted = False
            return True
        return False

    def calibrate(self, before: Placement, timeline: Timeline | None) -> Placement:
        """The placement by the rates of the last step; if it stays the same, what was measured is expected from now on.

        Args:
            before: the placement of that step.
            timeline: of that step; None if this rank updated nothing.
        """
        machine = self.machine if timeline is None else calibrated(self.machine, self.job, before, timeline)
        machines: list[Machine] = ranks.gather(machine)
        slowest = {
            name: min(getattr(machines[rank], name) for rank in self._node) for name in machine.as_dict()
        }  # the ranks of a node share what is slow
        self.machine = Machine(**slowest)
        placement = self.choose()
        if timeline is None:
            return placement
        measured = update_seconds(timeline)
        if before.same_as(placement):
            self._drift = Drift(measured)
            log.info("updates take %.3f s, not as predicted; the placement is still the best", measured)
        else:
            log.info("updates took %.3f s: from %s to %s", measured, before.describe(), placement.describe())
        return placement

    @property
    def _open_ended(self) -> bool:
        """True if what a step leaves free on the device decides how much state stays there."""
        settings = self.settings
        chosen_here = settings.mode == "auto" or (settings.mode == "twinflow" and settings.resident_fraction is None)
        return chosen_here and settings.device_memory is None

    def _local_rank(self) -> LocalRank:
        index = self._node.index(torch.distributed.get_rank())
        infos = [self._ranks[rank] for rank in self._node]
        own = divide([each.cores for each in infos], [each.numa_node for each in infos])[index]
        # Without a GPU the model is computed on the same cores: the update may take them all, and wherever they are.
        pinned = own if own and self._device.pins else None
        return LocalRank(index, len(self._node), self.settings.cpu_threads or max(1, len(own) - 1), pinned)

    def _measure(self) -> Machine:
        """This rank's part of its node; rates only where a placement is computed from them."""
        settings, node = self.settings, [self._ranks[rank] for rank in self._node]
        host = 0.8 * min(info.host_free for info in node) / len(node)
        if settings.host_memory is not None:
            host = settings.host_memory * 1e9
        memory = min(info.device_free for info in node)
        if self._device.torch_device.type != "cuda":
            memory = 0.8 * memory / len(node)
        if settings.device_memory is not None:
            memory = settings.device_memory * 1e9
        ranks.on_every_rank(lambda: profile.check_drives(settings.nvme_paths))
        space = free_space(settings.nvme_paths) / len(node)
        if settings.mode == "auto" or len(settings.nvme_paths) > 1 or settings.profile is not None:
            measured = self._profile()
            drives = [measured.nvme[str(Path(path))] for path in settings.nvme_paths]
            self.nvme_rates = [min(drive["read"], drive["write"]) for drive in drives] or None
            machine = measured.machine(
                ranks=len(node),
                host_memory=host,
                device_free=memory,
                size=settings.subgroup_size,
                eight_bit=self.job.eight_bit,
            )
            return replace(machine, nvme_free=space)
        machine = replace(_UNMEASURED, host_free=host, device_free=memory, nvme_free=space)
        return replace(machine, nvme_read=1.0, nvme_write=1.0) if settings.nvme_paths else machine

    def _profile(self) -> profile.Profile:
        """The profile of this node, read or measured by its first rank while the others wait."""
        found = ranks.on_every_rank(lambda: self._read_or_measure() if self.local.index == 0 else None)
        chosen: profile.Profile = ranks.gather(found)[self._node[0]]
        return chosen

    def _read_or_measure(self) -> profile.Profile:
        paths = [Path(path) for path in self.settings.nvme_paths]
        fingerprint, _ = profile.describe(self._device, self.local.threads, paths)
        path = Path(self.settings.profile or profile.cache_path(fingerprint))
        if self.settings.profile is not None or path.exists():
            return profile.load(path, fingerprint)
        log.info("measuring this machine for offload.mode=%s, about 20 s", self.settings.mode)
        measured = profile.measure(self._device, threads=self.local.threads, nvme_paths=paths, device_free=0.0)
        measured.save(path)
        return measured

    def _decide(self) -> tuple[Placement, float]:
        """The placement of this rank's node, and the seconds that its updates should take."""
        job = replace(self.job, parameters=max(1, *(self._ranks[rank].parameters for rank in self._node)))
        beside = 0.0 if self._overlaps else self._step_seconds

        def decide() -> tuple[Placement, float]:
            placement = plan(self.settings, self.machine, job, beside).placement
            return placement, update_seconds(predict(self.machine, job, placement))

        own = ranks.on_every_rank(lambda: decide() if self.local.index == 0 else None)
        decided: tuple[Placement, float] = ranks.gather(own)[self._node[0]]
        return decided


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


def _device_free(device: Device) -> float:
    if device.torch_device.type != "cuda":
        return profile.available_memory()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return float(torch.cuda.mem_get_info()[0] + cached)


_UNMEASURED = Machine(
    h2d=1.0, d2h=1.0, duplex=2.0, dram=1.0, cpu_rate=1.0, device_rate=1.0, device_free=0.0, host_free=0.0
)
"""Of a mode that names its routes, only the memory counts."""

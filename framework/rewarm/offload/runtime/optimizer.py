"""AdamW over any list of parameter shards, with its state under a placement: what an engine talks to.

Megatron's distributed optimizer and DeepSpeed's ZeRO 1 to 3 both end in "these pieces of these parameters are yours,
and here are their reduced gradients". That list, in the order of the forward pass, is all that is needed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewarm.errors import ensure
from rewarm.kernels.blocks import QUANTIZED_BLOCK
from rewarm.offload.planning.routes import Job, Placement
from rewarm.offload.planning.simulate import Timeline
from rewarm.offload.runtime.device import Device
from rewarm.offload.runtime.execute import Executor, GroupStep
from rewarm.offload.runtime.pieces import Pieces, cut_layout
from rewarm.offload.runtime.slabs import ALIGNMENT, HostPool, ParameterShard, StateLayout
from rewarm.offload.runtime.states import States


@dataclass(frozen=True, slots=True)
class Resources:
    """What state is kept in and updated with, besides the device."""

    pool: HostPool
    """Host memory."""
    gradient_type: torch.dtype
    """Of the gradients that each step is given."""
    nvme_paths: Sequence[Path] = ()
    """Folders for state on NVMe."""
    nvme_shares: Sequence[float] | None = None
    """Part of that state that each folder takes; None for equal parts."""
    cpu_threads: int = 1
    """Threads of the CPU's update."""
    cores: Sequence[int] | None = None
    """Cores they are pinned to; None leaves them alone."""


class OffloadedAdamW:
    """Updates an engine's shards in place; the fp32 state lives where the placement says.

    A step is :meth:`begin`, :meth:`ready` for each shard, and :meth:`release`, after which it runs beside whatever the
    engine does next, until :meth:`finish`. Whoever reads or writes the state finishes it first.

    Attributes:
        layout: the flat state and its cut.
        placement: the route of each subgroup.
        timeline: when each task of the step that was finished last ran; None if there was none since the state moved.
    """

    def __init__(
        self,
        names: Sequence[str],
        shards: Sequence[Tensor],
        groups: Sequence[int],
        placement: Placement,
        job: Job,
        device: Device,
        resources: Resources,
        *,
        subgroup_size: int,
        masters: Sequence[Tensor] | None = None,
    ) -> None:
        """Take over the shards, with moments of zero.

        Args:
            names: of the shards' parameters.
            shards: flat views of this rank's pieces of the model's parameters, of one type, on the device, in the
                order of their first use. Each step writes into them.
            groups: parameter group of each shard.
            placement: made for ``layout_of(names, shards, groups, subgroup_size, eight_bit=job.eight_bit)``.
            job: widths, whether updates wait for the norm, and whether moments have 8 bits.
            device: where the shards are.
            resources: memory, drives and threads.
            subgroup_size: elements per subgroup.
            masters: fp32 values of the shards; None to take the shards' own.
        """
        self.layout = layout_of(names, shards, groups, subgroup_size, eight_bit=job.eight_bit)
        self._cuts = cut_layout(self.layout)
        self._parameters = Pieces(self.layout, shards)
        self._device, self._resources = device, resources
        widths = {"grad_bytes": resources.gradient_type.itemsize, "param_bytes": self._parameters.dtype.itemsize}
        self._job = replace(job, parameters=self.layout.numel, **widths)
        self._executor: Executor | None = None
        self._given: Sequence[Tensor] | None = None
        self._waiting: set[int] = set()
        self._not_waited_for: set[int] = set()
        self.timeline: Timeline | None = None
        self._held: tuple[int, Tensor, Tensor, Tensor] | None = None
        self._changed = False
        self.states = self._open(placement)
        self._fill(shards if masters is None else masters)

    def step(
        self, number: int, gradients: Sequence[Tensor], groups: Sequence[GroupStep], grad_scale: float = 1.0
    ) -> Timeline:
        """Update every shard from its reduced gradient; the step has ended when this returns.

        Args:
            number, gradients, groups: see :meth:`begin`.
            grad_scale: see :meth:`release`.

        Returns:
            When each task ran.
        """
        self.begin(number, gradients, groups)
        self.release(grad_scale)
        timeline = self.finish()
        assert timeline is not None
        return timeline

    def begin(self, number: int, gradients: Sequence[Tensor], groups: Sequence[GroupStep]) -> None:
        """Start a step, after the one before has ended: state is read and fetched from now on.

        Args:
            number: the step, from 1.
            gradients: flat, in the order of the shards, of the type announced; none is read before it is ready.
            groups: settings of each parameter group.
        """
        kind = self._resources.gradient_type
        for gradient in gradients:
            ensure(gradient.dtype == kind, f"gradients are {gradient.dtype}, not {kind} as announced")
        self.settle()
        if self._executor is None:
            self._executor = self._start(Pieces(self.layout, gradients))
        elif gradients is not self._given:
            self._executor.use_gradients(Pieces(self.layout, gradients))
        self._given = gradients
        self._waiting = set(range(len(self.layout.shards)))
        self._events: list[list[Any]] = [[] for _ in self._cuts]
        self._executor.begin(number, groups)

    def ready(self, shard: int, event: Any = None) -> None:
        """A shard's gradient is final: it may be copied to the host.

        Args:
            shard: its index.
            event: handle of the collective that computes it; None means that the calling thread has queued all work.
        """
        assert self._executor is not None and shard in self._waiting, "no such gradient is waited for"
        self._waiting.remove(shard)
        event = self._device.record_event() if event is None else event
        for subgroup in self.layout.subgroups_of(shard):
            events = self._events[subgroup]
            events.append(event)
            if len(events) == len(self._cuts[subgroup]):
                self._executor.gradient_ready(subgroup, events)

    def release(self, grad_scale: float = 1.0) -> None:
        """Let the updates begin; gradients that were not ready are now.

        Args:
            grad_scale: unscale factor times clip factor.
        """
        assert self._executor is not None
        for shard in sorted(self._waiting, reverse=True):
            self.ready(shard)
        self._not_waited_for = set(range(len(self.layout.shards)))
        self._executor.release(grad_scale)

    @property
    def begun(self) -> bool:
        """True between :meth:`begin` and :meth:`release`."""
        return self._executor is not None and self._executor.step is not None and not self._executor.step.released

    @property
    def updating(self) -> bool:
        """True from :meth:`release` until the step was finished."""
        return self._executor is not None and self._executor.step is not None and self._executor.step.released

    def wait(self, shard: int) -> None:
        """Block until an update that was released has written a shard's parameters."""
        # Asked before every module of every forward pass: the first answer of a step serves for the others.
        if shard in self._not_waited_for:
            assert self._executor is not None
            for subgroup in self.layout.subgroups_of(shard):
                self._executor.wait_parameters(subgroup)
            self._not_waited_for.remove(shard)

    def wait_gradients(self) -> None:
        """Block until an update that was released reads no gradient any more."""
        if self.updating:
            assert self._executor is not None
            self._executor.wait_gradients()

    def finish(self) -> Timeline | None:
        """Block until the step that was released has ended; one that was only begun is undone.

        Returns:
            When each task ran; None if there was no step.

        Raises:
            BaseException: what went wrong in a stream, in this step or an earlier one: the state is not whole any more.
        """
        executor = self._executor
        if executor is None:
            return None
        if executor.failure is not None:
            raise executor.failure
        if executor.step is None:
            return None
        if not executor.step.released:
            executor.abandon()
            return None
        self.timeline = executor.finish()
        self._not_waited_for = set()
        return self.timeline

    def read(self, shard: int, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Master and moments of a shard as new fp32 host tensors: what a plain optimizer would checkpoint.

        Reading in order touches every subgroup once; no more than one is held besides.

        Args:
            shard: its index.
            start, stop: the elements of it; None means to its end.
        """
        stop = self.layout.shards[shard].numel if stop is None else stop
        found = torch.empty(stop - start), torch.empty(stop - start), torch.empty(stop - start)
        for subgroup, source, target in self._overlap(shard, start, stop):
            for array, values in zip(found, self._window(subgroup), strict=True):
                array[target] = values[source]
        return found

    def write(self, shard: int, master: Tensor, moment1: Tensor, moment2: Tensor, start: int = 0) -> None:
        """Set a shard's state, and its parameters to the rounded master.

        Parts of a shard with 8-bit moments are to be written in order with nothing in between: a block that two parts
        share is quantised when another subgroup is looked at.

        Args:
            shard: its index.
            master, moment1, moment2: fp32, up to as many elements as the shard has.
            start: the shard's element that they begin at.
        """
        given = [values.detach().reshape(-1).to("cpu", torch.float32) for values in (master, moment1, moment2)]
        stop = start + len(given[0])
        for subgroup, target, source in self._overlap(shard, start, stop):
            for array, values in zip(self._window(subgroup), given, strict=True):
                array[target] = values[source]
            self._changed = True
        self._parameters.tensors[shard][start:stop].copy_(given[0])

    def _overlap(self, shard: int, start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
        """Where elements of a shard lie: subgroup, elements within it, and elements counted from ``start``."""
        for subgroup in self.layout.subgroups_of(shard):
            for cut in self._cuts[subgroup]:
                first, last = max(start, cut.offset), min(stop, cut.offset + cut.stop - cut.start)
                if cut.shard == shard and first < last:
                    shift = cut.start - cut.offset
                    yield subgroup, slice(first + shift, last + shift), slice(first - start, last - start)

    def settle(self) -> None:
        """Finish a step, put what was written last where it belongs, and let go of the host copy."""
        self.finish()
        if self._held is not None and self._changed:
            self.states.put(*self._held)
        self._held, self._changed = None, False

    def device_bytes(self) -> int:
        """Bytes of the device that the state takes, its slots included."""
        return self.states.device_bytes()

    def state(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """:meth:`read` of every shard."""
        found = [self.read(shard) for shard in range(len(self.layout.shards))]
        self.settle()
        return found

    def load(self, masters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """:meth:`write` every shard, whatever placement or plain optimizer the state comes from."""
        for shard, values in enumerate(zip(masters, first, second, strict=True)):
            self.write(shard, *values)
        self.settle()

    def place(self, placement: Placement) -> None:
        """Move to another placement between two steps; nothing but the place changes."""
        self.settle()
        state = self.states.export(self._parameters)
        self.close()
        self.timeline = None
        self.states = self._open(placement)
        self._resources.pool.trim()
        self.states.load(*state, self._parameters)

    def close(self) -> None:
        """End the threads, after an update that was released, and give memory and files back."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None
        self.states.close()

    def _fill(self, masters: Sequence[Tensor]) -> None:
        for subgroup, cuts in enumerate(self._cuts):
            start, stop = self.layout.bounds(subgroup)
            master, zeros = torch.zeros(stop - start), torch.zeros(stop - start)
            for cut in cuts:
                master[cut.start : cut.stop] = masters[cut.shard][cut.offset : cut.offset + cut.stop - cut.start]
            self.states.put(subgroup, master, zeros, zeros)

    def _window(self, subgroup: int) -> tuple[Tensor, Tensor, Tensor]:
        """The host copy of a subgroup's state; the one before goes back where it belongs."""
        if self._held is None or self._held[0] != subgroup:
            self.settle()
            self._held = (subgroup, *self.states.get(subgroup, self._parameters))
        return self._held[1:]

    def _open(self, placement: Placement) -> States:
        resources = self._resources
        self.placement = placement
        return States(
            self.layout,
            placement,
            self._device,
            parameter_type=self._parameters.dtype,
            gradient_type=resources.gradient_type,
            pool=resources.pool,
            nvme_paths=resources.nvme_paths,
            nvme_shares=resources.nvme_shares,
            eight_bit=self._job.eight_bit,
        )

    def _start(self, gradients: Pieces) -> Executor:
        return Executor(
            self.layout,
            self.placement,
            self._job,
            self._device,
            self.states,
            parameters=self._parameters,
            gradients=gradients,
            cpu_threads=self._resources.cpu_threads,
            cores=self._resources.cores,
        )


def layout_of(
    names: Sequence[str],
    shards: Sequence[Tensor],
    groups: Sequence[int],
    subgroup_size: int,
    *,
    eight_bit: bool = False,
) -> StateLayout:
    """The flat state of some shards.

    With 8-bit moments every shard begins with a block of its own: no scale serves two parameters, and no cut into
    subgroups falls into a block.
    """
    sizes = (shard.numel() for shard in shards)
    alignment = QUANTIZED_BLOCK if eight_bit else ALIGNMENT
    return StateLayout.of(
        [ParameterShard(*item) for item in zip(names, sizes, groups, strict=True)], subgroup_size, alignment
    )

"""AdamW over any list of parameter shards, with its state under a placement: what an engine talks to.

Megatron's distributed optimizer and DeepSpeed's ZeRO 1 to 3 both end in "these pieces of these parameters are yours,
and here are their reduced gradients". That list, in the order of the forward pass, is all that is needed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rewarm.offload.device import Device
from rewarm.offload.execute import Executor, GroupStep
from rewarm.offload.pieces import Pieces, cut_layout
from rewarm.offload.routes import QUANTIZED_BLOCK, Job, Placement
from rewarm.offload.simulate import Timeline
from rewarm.offload.slabs import ALIGNMENT, HostPool, Layout, Shard
from rewarm.offload.states import States


@dataclass(frozen=True, slots=True)
class Means:
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

    Attributes:
        layout: the flat state and its cut.
        placement: the route of each subgroup.
    """

    def __init__(
        self,
        names: Sequence[str],
        shards: Sequence[Tensor],
        groups: Sequence[int],
        placement: Placement,
        job: Job,
        device: Device,
        means: Means,
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
            means: memory, drives and threads.
            subgroup_size: elements per subgroup.
            masters: fp32 values of the shards; None to take the shards' own.
        """
        self.layout = layout_of(names, shards, groups, subgroup_size, eight_bit=job.eight_bit)
        self._cuts = cut_layout(self.layout)
        self._parameters = Pieces(self.layout, shards)
        self._device, self._means = device, means
        widths = {"grad_bytes": means.gradient_type.itemsize, "param_bytes": self._parameters.dtype.itemsize}
        self._job = replace(job, parameters=self.layout.numel, **widths)
        self._executor: Executor | None = None
        self._held: tuple[int, Tensor, Tensor, Tensor] | None = None
        self._changed = False
        self.states = self._open(placement)
        self._fill(shards if masters is None else masters)

    def step(
        self, number: int, gradients: Sequence[Tensor], groups: Sequence[GroupStep], grad_scale: float = 1.0
    ) -> Timeline:
        """Update every shard from its reduced gradient.

        Args:
            number: the step, from 1.
            gradients: flat, in the order of the shards, of the type announced.
            groups: settings of each parameter group.
            grad_scale: unscale factor times clip factor.

        Returns:
            When each task ran.
        """
        kind = self._means.gradient_type
        for gradient in gradients:
            assert gradient.dtype == kind, f"gradients are {gradient.dtype}, not {kind} as announced"
        self.settle()
        if self._executor is None:
            self._executor = self._start(Pieces(self.layout, gradients))
        else:
            self._executor.use_gradients(Pieces(self.layout, gradients))
        return self._executor.run_step(number, groups, grad_scale)

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
        """Put what was written last where it belongs, and let go of the host copy."""
        if self._held is not None and self._changed:
            self.states.put(*self._held)
        self._held, self._changed = None, False

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
        self.states = self._open(placement)
        self.states.load(*state, self._parameters)

    def close(self) -> None:
        """End the threads and give memory and files back."""
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
        means = self._means
        self.placement = placement
        return States(
            self.layout,
            placement,
            self._device,
            parameter_type=self._parameters.dtype,
            gradient_type=means.gradient_type,
            pool=means.pool,
            nvme_paths=means.nvme_paths,
            nvme_shares=means.nvme_shares,
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
            cpu_threads=self._means.cpu_threads,
            cores=self._means.cores,
        )


def layout_of(
    names: Sequence[str],
    shards: Sequence[Tensor],
    groups: Sequence[int],
    subgroup_size: int,
    *,
    eight_bit: bool = False,
) -> Layout:
    """The flat state of some shards.

    With 8-bit moments every shard begins with a block of its own: no scale serves two parameters, and no cut into
    subgroups falls into a block.
    """
    sizes = (shard.numel() for shard in shards)
    alignment = QUANTIZED_BLOCK if eight_bit else ALIGNMENT
    return Layout.of([Shard(*item) for item in zip(names, sizes, groups, strict=True)], subgroup_size, alignment)

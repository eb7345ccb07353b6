"""The optimizer state of one rank under a placement: where each subgroup's arrays are, and how they move."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rewarm.errors import ensure
from rewarm.kernels import adamw
from rewarm.kernels.blocks import QUANTIZED_BLOCK
from rewarm.offload.planning.routes import Placement, Route
from rewarm.offload.runtime.device import Device
from rewarm.offload.runtime.nvme import Store
from rewarm.offload.runtime.pieces import Pieces
from rewarm.offload.runtime.slabs import HostPool, StateLayout, aligned


@dataclass(frozen=True, slots=True)
class State:
    """Arrays of one subgroup, of its length but for the scales."""

    moment1: torch.Tensor
    """fp32, or uint8 codes."""
    moment2: torch.Tensor
    """fp32, or uint8 codes; with ``low``, its sign belongs to the split."""
    master: torch.Tensor | None = None
    """fp32 parameters; None with ``low``, and where the model's fp32 parameters are the master."""
    low: torch.Tensor | None = None
    """int16, the low halves of the master, whose high halves are the model's bf16 parameters."""
    scales1: torch.Tensor | None = None
    """fp32, one per block of codes of the first moment."""
    scales2: torch.Tensor | None = None
    """fp32, one per block of codes of the second moment."""

    def arrays(self) -> tuple[torch.Tensor, ...]:
        """In the order in which they move."""
        every = (self.moment1, self.moment2, self.master, self.low, self.scales1, self.scales2)
        return tuple(array for array in every if array is not None)

    def moments_8bit(self, span: slice) -> adamw.Moments8bit | None:
        """Elements that begin with a block, as codes and scales; None where the moments are fp32."""
        if self.scales1 is None or self.scales2 is None:
            return None
        ensure(span.start % QUANTIZED_BLOCK == 0, "a block of 8-bit moments is cut")
        blocks = slice(span.start // QUANTIZED_BLOCK, -(-span.stop // QUANTIZED_BLOCK))
        return adamw.Moments8bit(self.moment1[span], self.moment2[span], self.scales1[blocks], self.scales2[blocks])

    def update(
        self,
        step: adamw.AdamWStep,
        span: slice,
        parameter: torch.Tensor,
        grad: torch.Tensor,
        out: torch.Tensor | None,
        threads: int,
    ) -> None:
        """One AdamW update of some elements.

        Args:
            step: constants of the step.
            span: the elements.
            parameter: the model's own; only a state without ``master`` looks at it, and updates it.
            grad: of the elements.
            out: 16 bits; receives the rounded master.
            threads: of the CPU.
        """
        if self.low is not None:
            moments = self.moment1[span], self.moment2[span]
            adamw.update_split(step, parameter, self.low[span], *moments, grad, threads=threads)
            return
        master = parameter if self.master is None else self.master[span]
        quantized = self.moments_8bit(span)
        if quantized is not None:
            adamw.update_8bit(step, master, quantized, grad, out, threads=threads)
        else:
            adamw.update(step, master, self.moment1[span], self.moment2[span], grad, out, threads=threads)


class States:
    """State of every subgroup, with the buffers it passes through."""

    def __init__(
        self,
        layout: StateLayout,
        placement: Placement,
        device: Device,
        *,
        parameter_type: torch.dtype,
        gradient_type: torch.dtype,
        pool: HostPool,
        nvme_paths: Sequence[Path] = (),
        nvme_shares: Sequence[float] | None = None,
        eight_bit: bool = False,
    ) -> None:
        """Allocate; the state is undefined until :meth:`load`.

        Args:
            layout: the flat state and its cut.
            placement: a route for each of its subgroups.
            device: what the state moves to and from.
            parameter_type: bf16, fp16 or fp32.
            gradient_type: what the engine's gradients are.
            pool: host memory, locked if the device needs that; :meth:`close` gives back what is taken from it.
            nvme_paths: folders for subgroups that rest on NVMe.
            nvme_shares: part of them that each path takes; None for equal parts.
            eight_bit: keep the moments as one byte each; the layout must be aligned to their blocks.

        Raises:
            UserError: if host memory or an NVMe path does not suffice.
        """
        ensure(not placement.split or parameter_type == torch.bfloat16, "only bf16 parameters are half of a master")
        ensure(not (placement.split and eight_bit), "8-bit moments have no bit to spare for a split")
        ensure(
            not eight_bit or not any(first % QUANTIZED_BLOCK for first in (layout.subgroup_size, *layout.offsets)),
            "a subgroup or shard begins inside a block of 8-bit moments",
        )
        self.eight_bit = eight_bit
        self.layout, self.placement, self.device = layout, placement, device
        self.parameter_type, self.gradient_type = parameter_type, gradient_type
        self.pool = pool
        self._taken: list[torch.Tensor] = []
        self.store: Store | None = None
        self._host: dict[int, State] = {}
        self._resident: dict[int, State] = {}
        self._gradients: dict[int, torch.Tensor] = {}
        self._parameters: dict[int, torch.Tensor] = {}
        self._device_slots: dict[int, torch.Tensor] = {}
        self._host_slots: dict[int, torch.Tensor] = {}
        for subgroup in range(layout.subgroups):
            self._allocate(subgroup, placement.routes[subgroup])
        self._allocate_slots()
        device.settle()  # what the calling thread has queued may still work on memory that it freed
        sizes = [self._bytes(i) if placement.routes[i].on_nvme else 0 for i in range(layout.subgroups)]
        if any(sizes):
            self._blob = {i: number for number, i in enumerate(i for i, size in enumerate(sizes) if size)}
            blobs = [aligned(size, mmap.PAGESIZE) for size in sizes if size]
            self.store = Store(list(nvme_paths), blobs, nvme_shares)

    def close(self) -> None:
        """Give back files and host memory; the state is lost."""
        if self.store is not None:
            self.store.close()
        for tensor in self._taken:
            self.pool.give(tensor)
        self._taken = []

    def load(
        self,
        master: torch.Tensor,
        moment1: torch.Tensor,
        moment2: torch.Tensor,
        parameters: torch.Tensor | Pieces,
    ) -> None:
        """Fill the state from flat host arrays, and the model's parameters with the rounded master.

        Args:
            master, moment1, moment2: fp32 [layout.numel] on the host, as a plain optimizer keeps them.
            parameters: the engine's, or a flat [layout.numel] on the device; filled.
        """
        pieces = parameters if isinstance(parameters, Pieces) else Pieces(self.layout, parameters)
        for subgroup in range(self.layout.subgroups):
            start, stop = self.layout.bounds(subgroup)
            self.put(subgroup, master[start:stop], moment1[start:stop], moment2[start:stop])
            for piece in pieces.of(subgroup):
                piece.tensor.copy_(master[start:stop][piece.span])

    def export(self, parameters: torch.Tensor | Pieces) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Master and moments as flat fp32 host arrays, whatever the placement: what a checkpoint holds."""
        pieces = parameters if isinstance(parameters, Pieces) else Pieces(self.layout, parameters)
        flat = tuple(torch.zeros(self.layout.numel) for _ in range(3))
        for subgroup in range(self.layout.subgroups):
            start, stop = self.layout.bounds(subgroup)
            for target, values in zip(flat, self.get(subgroup, pieces), strict=True):
                target[start:stop] = values
        return flat[0], flat[1], flat[2]

    def put(self, subgroup: int, master: torch.Tensor, moment1: torch.Tensor, moment2: torch.Tensor) -> None:
        """Set one subgroup's state; the model's parameters must be the rounded master before the next step.

        Args:
            master, moment1, moment2: fp32, of the subgroup's length, on the host.
        """
        state = self._stage(subgroup)
        if state.low is not None:
            # The sign of the second moment belongs to the split.
            low, moment2 = torch.empty(len(master), dtype=torch.int16), moment2.clone()
            adamw.split(master.contiguous(), master.to(torch.bfloat16), low, moment2)
            state.low.copy_(low)
        elif state.master is not None:
            state.master.copy_(master)
        quantized = state.moments_8bit(slice(0, len(master)))
        if quantized is not None:
            found = adamw.Moments8bit.of(moment1.contiguous(), moment2.contiguous())
            for target, source in zip(quantized.arrays(), found.arrays(), strict=True):
                target.copy_(source)
        else:
            state.moment1.copy_(moment1)
            state.moment2.copy_(moment2)
        if self.placement.routes[subgroup].on_nvme:
            self.write(subgroup, 0)

    def get(self, subgroup: int, parameters: Pieces) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Master and moments of one subgroup as new fp32 host arrays of its length."""
        if self.placement.routes[subgroup].on_nvme:
            self.read(subgroup, 0)
        state = self._stage(subgroup)
        quantized = state.moments_8bit(slice(0, self._length(subgroup)))
        if quantized is not None:
            moment1, moment2 = quantized.values()
        else:
            moment1, moment2 = (moment.to("cpu", copy=True) for moment in (state.moment1, state.moment2))
        if state.master is not None:
            return state.master.to("cpu", copy=True), moment1, moment2
        own = parameters.gather(subgroup, torch.zeros(len(moment1), dtype=parameters.dtype))
        if state.low is None:
            return own, moment1, moment2
        master = torch.zeros_like(moment1)
        adamw.join(own, state.low.cpu(), moment2, master)
        return master, moment1, moment2

    def device_bytes(self) -> int:
        """Bytes of the device's memory that resident state and slots take."""
        resident = sum(self._bytes(subgroup) for subgroup in self._resident)
        return resident + sum(slot.numel() for slot in self._device_slots.values())

    def host_gradient(self, subgroup: int) -> torch.Tensor:
        """Host buffer that a CPU-updated subgroup's gradient is copied to."""
        return self._gradients[subgroup]

    def host_parameters(self, subgroup: int, host_slot: int | None) -> torch.Tensor:
        """Host array that is copied to the device after a CPU update: the 16-bit copy, or the fp32 master itself."""
        if self.parameter_type != torch.float32:
            return self._parameters[subgroup]
        master = self.working(subgroup, None, host_slot).master
        assert master is not None
        return master

    def working(self, subgroup: int, slot: int | None, host_slot: int | None) -> State:
        """The arrays that the update works on."""
        route = self.placement.routes[subgroup]
        if route is Route.RESIDENT:
            return self._resident[subgroup]
        if route.moves_state:
            assert slot is not None
            return self._view(self._device_slots[slot], subgroup)
        return self._resting(subgroup, host_slot)

    def fetch(self, subgroup: int, slot: int | None, host_slot: int | None) -> None:
        """Host to device slot."""
        for target, source in zip(
            self.working(subgroup, slot, None).arrays(), self._resting(subgroup, host_slot).arrays(), strict=True
        ):
            self.device.copy(target, source, "h2d")

    def flush(self, subgroup: int, slot: int | None, host_slot: int | None) -> None:
        """Device slot to host."""
        for target, source in zip(
            self._resting(subgroup, host_slot).arrays(), self.working(subgroup, slot, None).arrays(), strict=True
        ):
            self.device.copy(target, source, "d2h")

    def read(self, subgroup: int, host_slot: int | None) -> None:
        """NVMe to host slot."""
        assert self.store is not None
        self.store.read(self._blob[subgroup], self._blob_buffer(subgroup, host_slot))

    def write(self, subgroup: int, host_slot: int | None) -> None:
        """Host slot to NVMe."""
        assert self.store is not None
        self.store.write(self._blob[subgroup], self._blob_buffer(subgroup, host_slot))

    def _take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        tensor = self.pool.take(numel, dtype)
        self._taken.append(tensor)
        return tensor

    def _length(self, subgroup: int) -> int:
        start, stop = self.layout.bounds(subgroup)
        return stop - start

    def _splits(self, subgroup: int) -> bool:
        return self.placement.split and self.placement.routes[subgroup].moves_state

    def _parts(self, subgroup: int) -> list[tuple[str, torch.dtype, int]]:
        """Name in :class:`State`, type and elements of a subgroup's arrays."""
        length, kind = self._length(subgroup), torch.uint8 if self.eight_bit else torch.float32
        parts = [("moment1", kind, length), ("moment2", kind, length)]
        if self._splits(subgroup):
            parts.insert(0, ("low", torch.int16, length))
        elif self.placement.routes[subgroup] is not Route.RESIDENT or self.parameter_type != torch.float32:
            parts.insert(0, ("master", torch.float32, length))
        if self.eight_bit:
            blocks = -(-length // QUANTIZED_BLOCK)
            parts += [("scales1", torch.float32, blocks), ("scales2", torch.float32, blocks)]
        return parts

    def _bytes(self, subgroup: int) -> int:
        return sum(dtype.itemsize * count for _, dtype, count in self._parts(subgroup))

    def _allocate(self, subgroup: int, route: Route) -> None:
        size = self._bytes(subgroup)
        if route is Route.RESIDENT:
            memory = torch.empty(size, dtype=torch.uint8, device=self.device.torch_device)
            self._resident[subgroup] = self._view(memory, subgroup)
        elif not route.on_nvme:
            self._host[subgroup] = self._view(self._take(size, torch.uint8), subgroup)
        if not route.on_device:
            self._gradients[subgroup] = self._take(self._length(subgroup), self.gradient_type)
            if self.parameter_type != torch.float32:
                self._parameters[subgroup] = self._take(self._length(subgroup), self.parameter_type)

    def _allocate_slots(self) -> None:
        routes = self.placement.routes
        moving = [self._bytes(i) for i, route in enumerate(routes) if route.moves_state]
        for slot in range(min(self.placement.slots, len(moving))):
            memory = torch.empty(max(moving), dtype=torch.uint8, device=self.device.torch_device)
            self._device_slots[slot] = memory
        stored = [self._bytes(i) for i, route in enumerate(routes) if route.on_nvme]
        for slot in range(min(self.placement.host_slots, len(stored))):
            self._host_slots[slot] = self._take(aligned(max(stored), mmap.PAGESIZE), torch.uint8)

    def _view(self, memory: torch.Tensor, subgroup: int) -> State:
        """The arrays end to end in a buffer; lengths are multiples of 64 elements, so all but scales begin aligned."""
        arrays, first = {}, 0
        for name, dtype, count in self._parts(subgroup):
            arrays[name] = memory[first : first + dtype.itemsize * count].view(dtype)
            first += dtype.itemsize * count
        return State(**arrays)

    def _resting(self, subgroup: int, host_slot: int | None) -> State:
        """The host arrays of a subgroup: its own, or those of the slot it was read into."""
        if not self.placement.routes[subgroup].on_nvme:
            return self._host[subgroup]
        assert host_slot is not None
        return self._view(self._host_slots[host_slot], subgroup)

    def _stage(self, subgroup: int) -> State:
        route = self.placement.routes[subgroup]
        return self._resident[subgroup] if route is Route.RESIDENT else self._resting(subgroup, 0)

    def _blob_buffer(self, subgroup: int, host_slot: int | None) -> torch.Tensor:
        assert host_slot is not None
        return self._host_slots[host_slot][: aligned(self._bytes(subgroup), mmap.PAGESIZE)]

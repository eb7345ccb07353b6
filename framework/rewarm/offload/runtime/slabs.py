"""The flat fp32 state of one rank, cut into subgroups, and the host memory it rests in.

Megatron's distributed optimizer and DeepSpeed ZeRO both give a rank a list of pieces of parameters. A
:class:`StateLayout` lays those pieces end to end, each at an aligned offset, and cuts the result into subgroups of
equal length (the last may be shorter). Nothing else here depends on where the pieces come from.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rewarm.errors import UserError, ensure

ALIGNMENT = 64
"""Elements: a cache line of 16-bit numbers is half of it, and every vector width divides it."""


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """A piece of a parameter that this rank updates."""

    name: str
    """Name of the parameter, for messages and checkpoints."""
    numel: int
    """Elements of this rank's piece."""
    group: int = 0
    """Index of the optimizer's parameter group, which has its own learning rate and weight decay."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of elements of one subgroup that belong to one parameter group."""

    start: int
    """First element, counted from the start of the subgroup."""
    stop: int
    """One past the last element."""
    group: int


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Where each shard lies in the flat state, and where the flat state is cut."""

    shards: tuple[ParameterShard, ...]
    offsets: tuple[int, ...]
    """First element of each shard in the flat state."""
    numel: int
    """Elements of the flat state, gaps included."""
    subgroup_size: int
    """Elements of every subgroup but the last."""

    @classmethod
    def of(cls, shards: Sequence[ParameterShard], subgroup_size: int, alignment: int = ALIGNMENT) -> StateLayout:
        """Lay shards end to end in the order given, which should be that of their first use in the forward pass.

        Args:
            shards: at least one, none empty.
            subgroup_size: wanted elements per subgroup; rounded up to the alignment.
            alignment: elements that every shard and every subgroup begins at a multiple of.
        """
        ensure(shards and all(shard.numel > 0 for shard in shards) and subgroup_size > 0, "a layout of nothing")
        offsets, end = [], 0
        for shard in shards:
            offsets.append(end)
            end += aligned(shard.numel, alignment)
        return cls(tuple(shards), tuple(offsets), end, aligned(subgroup_size, alignment))

    @property
    def subgroups(self) -> int:
        """Number of subgroups."""
        return -(-self.numel // self.subgroup_size)

    def bounds(self, subgroup: int) -> tuple[int, int]:
        """First element of a subgroup in the flat state, and one past its last."""
        start = subgroup * self.subgroup_size
        return start, min(start + self.subgroup_size, self.numel)

    def segments(self, subgroup: int) -> tuple[Segment, ...]:
        """The subgroup's runs of one parameter group each; gaps between shards go with the shard before them."""
        start, stop = self.bounds(subgroup)
        found: list[Segment] = []
        ends = (*self.offsets[1:], self.numel)
        for shard, first, last in zip(self.shards, self.offsets, ends, strict=True):
            if last <= start or first >= stop:
                continue
            left, right = max(first, start) - start, min(last, stop) - start
            if found and found[-1].group == shard.group:
                found[-1] = Segment(found[-1].start, right, shard.group)
            else:
                found.append(Segment(left, right, shard.group))
        return tuple(found)

    def view(self, flat: torch.Tensor, shard: int) -> torch.Tensor:
        """The elements of a shard in a flat tensor, shape [numel]."""
        return flat.narrow(0, self.offsets[shard], self.shards[shard].numel)

    def subgroups_of(self, shard: int) -> range:
        """The subgroups that hold a part of a shard: what its layer's forward pass waits for."""
        first = self.offsets[shard]
        last = first + self.shards[shard].numel - 1
        return range(first // self.subgroup_size, last // self.subgroup_size + 1)


def aligned(elements: int, alignment: int = ALIGNMENT) -> int:
    """Elements rounded up to a multiple of the alignment."""
    return -(-elements // alignment) * alignment


class HostPool:
    """Page-aligned host memory by size class, without rounding a buffer up to a power of two.

    PyTorch's pinned allocator rounds to powers of two, which wastes up to half of the host memory that offloading
    exists to use (the observation is MemAscend's, arXiv 2505.23254). Here a buffer takes its own size rounded up to a
    page; a freed one serves the next request of its class exactly.
    """

    def __init__(self, *, pin: bool, limit: float = float("inf"), node: int | None = None) -> None:
        """An empty pool.

        Args:
            pin: lock the memory for the device's copy engine (needs CUDA).
            limit: bytes that may be taken in all, and kept for later.
            node: NUMA node to prefer, that of the device; None leaves it to Linux.
        """
        self.pin, self.limit, self.node, self.taken = pin, limit, node, 0
        self._free: dict[int, list[torch.Tensor]] = {}
        self._pinned: set[int] = set()

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised flat tensor that begins on a page.

        Raises:
            UserError: if the limit is passed, or if memory cannot be had or locked.
        """
        size = aligned(numel * dtype.itemsize, mmap.PAGESIZE)
        waiting = self._free.get(size)
        buffer = waiting.pop() if waiting else self._map(size)
        return buffer[: numel * dtype.itemsize].view(dtype)

    def give(self, tensor: torch.Tensor) -> None:
        """Return what :meth:`take` gave, whole; it must not be used any more."""
        size = aligned(tensor.numel() * tensor.element_size(), mmap.PAGESIZE)
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), 0, (size,))
        self._free.setdefault(size, []).append(whole)

    def trim(self) -> None:
        """Give what nobody uses back to the machine: after a change, buffers of other sizes are wanted."""
        for size, buffers in self._free.items():
            for buffer in buffers:
                if self.pin:
                    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
                    self._pinned.discard(buffer.data_ptr())
                self.taken -= size
        self._free.clear()

    def _map(self, size: int) -> torch.Tensor:
        if self.taken + size > self.limit:
            self.trim()
        if self.taken + size > self.limit:
            raise UserError(
                f"host memory for offloaded state is limited to {self.limit / 1e9:.2f} GB, "
                f"{(self.taken + size) / 1e9:.2f} GB are needed",
                fix="raise offload.host_memory, give offload.nvme_paths, or use more ranks",
            )
        try:
            region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise UserError(
                f"cannot get {size / 1e9:.2f} GB of host memory: {error.strerror}",
                fix="lower offload.host_memory, give offload.nvme_paths, or raise ulimit -v if it is set",
            ) from error
        # Direct I/O and a fork at the same time may leave the bytes in the child's copy of a page (open(2), notes).
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                region.madvise(getattr(mmap, advice))
        tensor = torch.frombuffer(region, dtype=torch.uint8)
        if self.node is not None:
            bind_to_node(tensor.data_ptr(), size, self.node)
        if self.pin:
            self._lock(tensor)
        self.taken += size
        return tensor

    def _lock(self, tensor: torch.Tensor) -> None:
        code = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)
        if int(code) != 0:
            import resource

            soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            allowed = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB"
            raise UserError(
                f"cannot lock {tensor.numel() / 1e9:.2f} GB of host memory for the device (CUDA error {int(code)}; "
                f"ulimit -l is {allowed})",
                fix="raise it (ulimit -l unlimited, or LimitMEMLOCK=infinity for a service), or lower "
                "offload.host_memory",
            )
        assert tensor.is_pinned()
        self._pinned.add(tensor.data_ptr())

    def close(self) -> None:
        """Unlock what was locked; the tensors must not be used for copies any more."""
        for pointer in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        self._pinned.clear()
        self._free.clear()


def bind_to_node(pointer: int, size: int, node: int) -> bool:
    """Ask Linux to keep a memory range on one NUMA node (mbind, preferred policy); False where that is refused."""
    number = {"x86_64": 237, "aarch64": 235}.get(platform.machine())
    if number is None:
        return False
    mask, preferred, bits = ctypes.c_ulong(1 << node), 1, 64
    # Every argument of a system call is as wide as a register.
    arguments = (*map(ctypes.c_ulong, (pointer, size, preferred)), ctypes.byref(mask), *map(ctypes.c_ulong, (bits, 0)))
    found: int = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments)
    return found == 0

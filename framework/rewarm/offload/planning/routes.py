"""Routes a subgroup's update can take, what each costs, and the machine and the job they are weighed on (numpy only).

Everything is per rank: what the ranks of a node share (cores, DRAM, NVMe) enters divided by their number.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, assert_never

from rewarm.kernels.blocks import QUANTIZED_BLOCK

STATE_BYTES = 12
"""fp32 master and two fp32 moments, per parameter."""
SPLIT_BYTES = 10
"""What moves when the bf16 half of the master is the model's own parameter: 2 low bytes and two moments."""
EIGHT_BIT_BYTES = 4 + 2 * (1 + 4 / QUANTIZED_BLOCK)
"""fp32 master, and two moments of one byte each with an fp32 scale per block."""


class Route(Enum):
    """Where a subgroup's state rests and who updates it."""

    RESIDENT = "resident"
    """State and update on the device."""
    STREAMED = "streamed"
    """State in host memory, fetched to the device for the update and flushed back."""
    CPU = "cpu"
    """State in host memory, updated by the CPU; gradients come down, parameters go up."""
    NVME_CPU = "nvme_cpu"
    """State on NVMe, read into host memory for the CPU's update and written back."""
    NVME_STREAMED = "nvme_streamed"
    """State on NVMe, read and fetched to the device for the update, flushed and written back."""

    @property
    def on_device(self) -> bool:
        """True if the device computes the update."""
        return self in (Route.RESIDENT, Route.STREAMED, Route.NVME_STREAMED)

    @property
    def moves_state(self) -> bool:
        """True if the state passes through a device slot."""
        return self in (Route.STREAMED, Route.NVME_STREAMED)

    @property
    def on_nvme(self) -> bool:
        """True if the state rests on NVMe."""
        return self in (Route.NVME_CPU, Route.NVME_STREAMED)


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates of one rank's share of a machine: bytes, parameters, seconds."""

    h2d: float
    """Bytes/s from pinned host memory to the device, alone."""
    d2h: float
    """Bytes/s from the device to pinned host memory, alone."""
    duplex: float
    """Bytes/s of both directions together, at most h2d + d2h."""
    dram: float
    """Bytes/s of this rank's share of host memory, reads plus writes."""
    cpu_rate: float
    """Parameters/s of the one-pass CPU update, alone."""
    device_rate: float
    """Parameters/s of the device's update."""
    device_free: float
    """Bytes of device memory left in the update phase, for resident state and slots."""
    host_free: float
    """Bytes of host memory this rank may pin."""
    device_free_backward: float = 0.0
    """Bytes of device memory left in the backward pass: slots that fit are filled ahead of the update."""
    nvme_read: float = 0.0
    """Bytes/s of all NVMe paths together, this rank's share; 0 without NVMe."""
    nvme_write: float = 0.0
    """Bytes/s of all NVMe paths together, this rank's share; 0 without NVMe."""
    nvme_free: float = 0.0
    """Bytes free on the NVMe paths, this rank's share."""

    def capacities(self) -> dict[str, float]:
        """Shared resources for :func:`rewarm.offload.planning.simulate.simulate`."""
        shared = {"h2d": self.h2d, "d2h": self.d2h, "pcie": self.duplex, "dram": self.dram}
        shared["device"] = self.device_rate
        if self.nvme_read > 0:
            shared |= {"nvme_read": self.nvme_read, "nvme_write": self.nvme_write}
        return shared

    def as_dict(self) -> dict[str, float]:
        """All fields, for a file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Job:
    """What one rank has to update in each step, and the compute it can hide behind."""

    parameters: int
    """Parameters of this rank's optimizer shard."""
    forward: float
    """Seconds of one forward pass."""
    backward: float
    """Seconds of one backward pass."""
    micro_batches: int = 1
    """Forward and backward passes per step; only the last backward and the next forward hide anything."""
    grad_bytes: int = 2
    """Bytes per gradient element on the wire."""
    param_bytes: int = 2
    """Bytes per parameter of the model, 2 or 4."""
    clip: bool = True
    """Wait for the global gradient norm before the first update."""
    eight_bit: bool = False
    """Moments of one byte each, with a scale per block: approximate."""

    @property
    def can_split(self) -> bool:
        """True if the master may move as its low half: beside 16-bit parameters, with fp32 moments, of which one has
        a bit to spare for it."""
        return self.param_bytes == 2 and not self.eight_bit

    def state_bytes(self, split: bool = False) -> float:
        """Bytes per parameter of master and moments; with ``split``, as they move where the master can be split."""
        if self.eight_bit:
            return EIGHT_BIT_BYTES
        return SPLIT_BYTES if split and self.can_split else STATE_BYTES

    @property
    def resident_bytes(self) -> float:
        """Bytes per parameter of state that stays on the device, where an fp32 parameter is its own master."""
        return self.state_bytes() - (4 if self.param_bytes == 4 else 0)

    @property
    def hidden(self) -> float:
        """Seconds of a step without any update."""
        return self.micro_batches * (self.forward + self.backward)


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes per parameter of one route."""

    h2d: float = 0.0
    d2h_gradient: float = 0.0
    d2h_state: float = 0.0
    dram: float = 0.0
    nvme: float = 0.0
    device_memory: float = 0.0
    host_memory: float = 0.0


def costs(route: Route, job: Job, split: bool) -> Costs:
    """What a parameter costs on a route.

    Args:
        route: the route.
        job: gives the width of gradients and parameters.
        split: move the master as its low half only (:func:`rewarm.kernels.adamw.split`).

    Returns:
        Bytes per parameter. The CPU's update reads the gradient and the state and writes the state and the 16-bit
        parameter; the copies to and from the device touch host memory once more each.
    """
    state, whole = job.state_bytes(split), job.state_bytes()
    out = job.param_bytes if job.param_bytes == 2 else 0
    update = job.grad_bytes + 2 * whole + out
    edges = job.grad_bytes + job.param_bytes
    if route is Route.RESIDENT:
        return Costs(device_memory=job.resident_bytes)
    if route is Route.STREAMED:
        return Costs(h2d=state, d2h_state=state, dram=2 * state, host_memory=state)
    if route is Route.CPU:
        held = whole + edges
        return Costs(h2d=job.param_bytes, d2h_gradient=job.grad_bytes, dram=update + edges, host_memory=held)
    if route is Route.NVME_CPU:
        return Costs(
            h2d=job.param_bytes,
            d2h_gradient=job.grad_bytes,
            dram=update + edges + 2 * whole,
            nvme=whole,
            host_memory=edges,
        )
    if route is Route.NVME_STREAMED:
        return Costs(h2d=state, d2h_state=state, dram=4 * state, nvme=state)
    assert_never(route)


@dataclass(frozen=True, slots=True)
class Placement:
    """The route of every subgroup, first used in the forward pass first."""

    routes: tuple[Route, ...]
    slots: int = 3
    """Device buffers that streamed subgroups pass through."""
    host_slots: int = 4
    """Host buffers that subgroups from NVMe pass through."""
    split: bool = False
    """Move the master as its low half only."""
    name: str = ""
    """How it was chosen."""
    cpu_share: float = 1.0
    """Share of this rank's CPU threads that updates, in (0, 1]; fewer leave DRAM to the copies."""
    early: int = 0
    """How many subgroups are updated first in the order in which their gradients appear, last layers first."""

    def count(self, route: Route) -> int:
        """Subgroups on a route."""
        return sum(chosen is route for chosen in self.routes)

    def describe(self) -> str:
        """One line: shares of the routes."""
        shares = [f"{self.count(route) / len(self.routes):.0%} {route.value}" for route in Route if self.count(route)]
        return ", ".join(shares) + (", split master" if self.split else "")

    def as_dict(self) -> dict[str, Any]:
        """For a file; :meth:`from_dict` reads it."""
        return {**asdict(self), "routes": [route.value for route in self.routes]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Placement:
        """The inverse of :meth:`as_dict`."""
        return cls(**{**values, "routes": tuple(Route(name) for name in values["routes"])})

    def renamed(self, name: str) -> Placement:
        """The same placement under another name."""
        return replace(self, name=name)

    def same_as(self, other: Placement) -> bool:
        """True if two placements differ in their names at most."""
        return self.renamed("") == other.renamed("")


def memory(placement: Placement, job: Job) -> tuple[float, float, float]:
    """Bytes of device memory, pinned host memory and NVMe that a placement needs on this rank."""
    size = job.parameters / len(placement.routes)
    device = host = nvme = 0.0
    for route in placement.routes:
        cost = costs(route, job, placement.split)
        device += cost.device_memory * size
        host += cost.host_memory * size
        nvme += cost.nvme * size
    if any(route.moves_state for route in placement.routes):
        device += min(placement.slots, len(placement.routes)) * job.state_bytes(placement.split) * size
    if any(route.on_nvme for route in placement.routes):
        host += placement.host_slots * job.state_bytes() * size
    return device, host, nvme

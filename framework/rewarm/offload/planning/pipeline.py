"""A placement as the tasks of one step: what the simulator times and what the executor runs (numpy only).

A step, as seen from the update: the last backward pass makes gradients ready from the last layers to the first; after
it (and, with clipping, after the global norm) the subgroups are updated in the order in which the next forward pass
uses them; that pass runs each piece as soon as its own parameters are new.
"""

from __future__ import annotations

from dataclasses import dataclass

from rewarm.offload.planning.routes import Costs, Job, Machine, Placement, Route, costs
from rewarm.offload.planning.simulate import Task, Timeline, simulate


@dataclass(frozen=True, slots=True)
class Style:
    """What other systems do differently, so that their published times can be computed."""

    overlap_forward: bool = True
    """Begin the next forward pass before the whole update is over."""
    blocking_gradients: float | None = None
    """Bytes/s of gradient copies that the backward pass waits for; None for copies beside it."""
    cpu_dram_bytes: float | None = None
    """Bytes of host memory traffic per CPU-updated parameter; None for this project's kernel."""


OURS = Style()


def step_tasks(machine: Machine, job: Job, placement: Placement, style: Style = OURS) -> list[Task]:
    """The tasks of one step in the order in which each stream takes its own."""
    return _Builder(machine, job, placement, style).build()


def predict(machine: Machine, job: Job, placement: Placement, style: Style = OURS) -> Timeline:
    """Simulate one step: the last backward pass, the update and the next forward pass."""
    return simulate(step_tasks(machine, job, placement, style), machine.capacities())


def step_seconds(machine: Machine, job: Job, placement: Placement, style: Style = OURS) -> float:
    """Predicted seconds per step, the other micro-batches included."""
    others = (job.micro_batches - 1) * (job.forward + job.backward)
    return others + predict(machine, job, placement, style).seconds


def update_order(subgroups: int, early: int) -> list[int]:
    """Order of the updates: ``early`` ones as their gradients appear (last first), the rest as they are needed."""
    return [*range(subgroups - 1, subgroups - 1 - early, -1), *range(subgroups - early)]


class _Builder:
    def __init__(self, machine: Machine, job: Job, placement: Placement, style: Style) -> None:
        self.machine, self.job, self.placement, self.style = machine, job, placement, style
        self.count = len(placement.routes)
        self.size = job.parameters / self.count
        self.tasks: list[Task] = []
        self.gradients: dict[int, int] = {}
        self.ready: dict[int, int] = {}
        self.flushes: list[int] = []
        self.writes: list[int] = []
        self.price = {route: costs(route, job, placement.split) for route in set(placement.routes)}
        slot = job.state_bytes(placement.split) * self.size
        self.prefetched = min(placement.slots, int(machine.device_free_backward / slot))

    def build(self) -> list[Task]:
        self._backward()
        for subgroup in update_order(self.count, self.placement.early):
            self._update(subgroup, self.placement.routes[subgroup])
        self._forward()
        return self.tasks

    def _add(self, task: Task) -> int:
        self.tasks.append(task)
        return len(self.tasks) - 1

    def _backward(self) -> None:
        rate = self.style.blocking_gradients
        computed = 0
        for subgroup in reversed(range(self.count)):
            computed = self._add(Task("backward", "compute", self.job.backward / self.count, subgroup=subgroup))
            self.gradients[subgroup] = computed
            size = self.price[self.placement.routes[subgroup]].d2h_gradient * self.size
            if size and rate is not None:
                task = Task("gradient", "compute", size / rate, {"d2h": size}, (computed,), subgroup)
                self.gradients[subgroup] = self._add(task)
            elif size:
                copied = self._copy("gradient", "gradients", "d2h", size, (computed,), subgroup)
                self.gradients[subgroup] = copied
        # The norm is taken on the device: it needs the gradients there, not their copies.
        self.barrier = self._add(Task("barrier", "compute", 0.0, after=(computed,)))

    def _copy(
        self,
        kind: str,
        stream: str,
        direction: str,
        size: float,
        after: tuple[int, ...],
        subgroup: int,
        slot: int | None = None,
        host_slot: int | None = None,
    ) -> int:
        rate = self.machine.h2d if direction == "h2d" else self.machine.d2h
        uses = {direction: size, "pcie": size, "dram": size}
        seconds = max(size / rate, size / self.machine.dram)
        return self._add(Task(kind, stream, seconds, uses, after, subgroup, slot, host_slot))

    def _released(self, subgroup: int) -> tuple[int, ...]:
        """What an update waits for: its gradient, and the norm where there is one."""
        return (self.barrier, self.gradients[subgroup]) if self.job.clip else (self.gradients[subgroup],)

    def _update(self, subgroup: int, route: Route) -> None:
        price, slot, host_slot = self.price[route], None, None
        state: tuple[int, ...] = ()
        if route.on_nvme:
            host_slot = len(self.writes) % self.placement.host_slots
            freed = tuple(self.writes[-self.placement.host_slots :][:1]) if self._full(self.writes, "host") else ()
            state = (self._nvme("read", price.nvme, freed, subgroup, host_slot),)
        if route.moves_state:
            slot = len(self.flushes) % self.placement.slots
            if self._full(self.flushes, "device"):
                state = (*state, self.flushes[-self.placement.slots])
            elif len(self.flushes) >= self.prefetched:
                state = (*state, self.barrier)  # the backward pass still has the memory
            size = price.h2d * self.size
            state = (self._copy("fetch", "fetch", "h2d", size, state, subgroup, slot, host_slot),)
        done = self._compute(route, price, (*state, *self._released(subgroup)), subgroup, slot, host_slot)
        self.ready[subgroup] = done
        if not route.on_device:
            size = price.h2d * self.size
            # An fp32 parameter is the master itself, which lies in the host slot; a 16-bit copy has its own buffer.
            held = host_slot if self.job.param_bytes == 4 else None
            self.ready[subgroup] = self._copy("upload", "upload", "h2d", size, (done,), subgroup, host_slot=held)
        if route.moves_state:
            size = price.d2h_state * self.size
            done = self._copy("flush", "flush", "d2h", size, (done,), subgroup, slot, host_slot)
            self.flushes.append(done)
        if route.on_nvme:
            after = (done, self.ready[subgroup]) if self.job.param_bytes == 4 else (done,)
            self.writes.append(self._nvme("write", price.nvme, after, subgroup, host_slot))

    def _full(self, used: list[int], kind: str) -> bool:
        return len(used) >= (self.placement.slots if kind == "device" else self.placement.host_slots)

    def _nvme(self, kind: str, price: float, after: tuple[int, ...], subgroup: int, host_slot: int | None) -> int:
        size = price * self.size
        rate = self.machine.nvme_read if kind == "read" else self.machine.nvme_write
        uses = {f"nvme_{kind}": size, "dram": size}
        task = Task(kind, f"nvme_{kind}", size / rate, uses, after, subgroup, host_slot=host_slot)
        return self._add(task)

    def _compute(
        self,
        route: Route,
        price: Costs,
        after: tuple[int, ...],
        subgroup: int,
        slot: int | None,
        host_slot: int | None,
    ) -> int:
        if route.on_device:
            # Two streams, so that streamed subgroups do not queue behind resident ones; they share the device.
            stream = "device" if route.moves_state else "resident"
            uses = {"device": self.size}
            seconds = self.size / self.machine.device_rate
            return self._add(Task("update", stream, seconds, uses, after, subgroup, slot, host_slot))
        traffic = self.style.cpu_dram_bytes or cpu_update_bytes(self.job)
        uses = {"dram": traffic * self.size}
        rate = self.machine.cpu_rate * self.placement.cpu_share
        seconds = max(self.size / rate, uses["dram"] / self.machine.dram)
        return self._add(Task("update", "cpu", seconds, uses, after, subgroup, host_slot=host_slot))

    def _forward(self) -> None:
        everything = tuple(self.ready.values())
        for subgroup in range(self.count):
            after = (self.ready[subgroup],) if self.style.overlap_forward else everything
            self._add(Task("forward", "compute", self.job.forward / self.count, {}, after, subgroup))


def cpu_update_bytes(job: Job) -> float:
    """Host memory traffic per parameter of the one-pass CPU update alone."""
    return job.grad_bytes + 2 * job.state_bytes() + (job.param_bytes if job.param_bytes == 2 else 0)

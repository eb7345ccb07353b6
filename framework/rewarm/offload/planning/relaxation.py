"""The linear program behind a placement, and its bound (numpy and scipy only).

Columns are the share of the parameters on each route and the window: the seconds from the end of the backward pass to
the end of the next forward pass. Rows say what each resource can move in that time, and what memory holds. Rounded to
whole subgroups the same program gives the counts that a placement begins with.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from rewarm.errors import UserError
from rewarm.offload.planning.routes import Job, Machine, Route, costs

_ROUTES = tuple(Route)


@dataclass(frozen=True, slots=True)
class Relaxation:
    """Optimum of the linear program."""

    shares: dict[Route, float]
    """Share of the parameters on each route."""
    counts: dict[Route, int]
    """The same in whole subgroups, within memory."""
    seconds: float
    """No placement of this kind takes less per step."""


def relax(
    machine: Machine, job: Job, subgroups: int, *, slots: int = 3, host_slots: int = 4, split: bool = True
) -> list[Relaxation]:
    """Solve the linear program, once for every set of means (slots, CPU, NVMe) that a placement may employ.

    What a means needs whatever its share (buffers, the way of the last subgroup through it) enters as a constant, so
    each optimum bounds the placements that employ just these means, and the least of them bounds all.

    Returns:
        The optima, fastest first.

    Raises:
        UserError: if no mixture of routes has room for the state.
    """
    found = []
    for streaming, cpu, nvme in itertools.product((False, True), repeat=3):
        if not nvme or (machine.nvme_read > 0 and (streaming or cpu)):
            program = _Program(
                machine, job, subgroups, slots if streaming else 0, cpu, host_slots if nvme else 0, split
            )
            if (optimum := program.solve()) is not None:
                found.append(optimum)
    if not found:
        raise no_room(machine, job)
    return sorted(found, key=lambda relaxation: relaxation.seconds)


class _Program:
    """One linear program: columns are the shares of the routes and the window, the seconds after the backward pass."""

    def __init__(
        self, machine: Machine, job: Job, subgroups: int, slots: int, cpu: bool, host_slots: int, split: bool
    ) -> None:
        self.machine, self.job, self.slots, self.cpu, self.host_slots = machine, job, slots, cpu, host_slots
        self.subgroups, self.size = subgroups, job.parameters / subgroups
        self.piece = job.forward / subgroups
        self.price = {route: costs(route, job, split) for route in _ROUTES}
        self.slot = job.state_bytes(split) * self.size
        self.rows: list[list[float]] = []
        self.limits: list[float] = []

    def solve(self) -> Relaxation | None:
        """The optimum, or None if memory does not suffice."""
        self._bandwidth_rows()
        self._memory_rows()
        self._employ_rows()
        relaxed = self._minimise(whole=False)
        rounded = None if relaxed is None else self._minimise(whole=True)
        if relaxed is None or rounded is None:
            return None
        shares = {route: float(share) for route, share in zip(_ROUTES, relaxed, strict=False)}
        counts = {route: round(share * self.subgroups) for route, share in zip(_ROUTES, rounded, strict=False)}
        others = (self.job.micro_batches - 1) * (self.job.forward + self.job.backward)
        return Relaxation(shares, counts, others + self.job.backward + float(relaxed[-1]))

    def _minimise(self, whole: bool) -> np.ndarray | None:
        """Shares and window of the optimum, of whole subgroups if asked; None if memory does not suffice."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        columns = len(_ROUTES) + 1
        most = [float(self.subgroups) if self._allowed(route) else 0.0 for route in _ROUTES]
        per_subgroup = np.array([1.0 / self.subgroups] * len(_ROUTES) + [1.0])
        result = milp(
            np.eye(columns)[-1],
            integrality=np.array([float(whole)] * len(_ROUTES) + [0.0]),
            bounds=Bounds([0.0] * len(_ROUTES) + [self.job.forward], [*most, np.inf]),
            constraints=[
                LinearConstraint(np.array(self.rows) * per_subgroup, ub=self.limits),
                LinearConstraint(np.array([[1.0] * len(_ROUTES) + [0.0]]), self.subgroups, self.subgroups),
            ],
            options={"time_limit": 5.0},
        )
        return None if result.x is None else result.x * per_subgroup

    def _allowed(self, route: Route) -> bool:
        return not (
            (route.moves_state and not self.slots)
            or (route.on_nvme and not self.host_slots)
            or (not route.on_device and not self.cpu)
        )

    def _row(self, cost: dict[Route, float], capacity: float, window: float, extra: float = 0.0) -> None:
        """Sum of share x parameters x cost <= capacity x (seconds after backward + window) + extra."""
        if math.isfinite(capacity):
            self.rows.append([self.job.parameters * cost[route] / 1e9 for route in _ROUTES] + [-capacity / 1e9])
            self.limits.append((capacity * window + extra) / 1e9)

    def _bandwidth_rows(self) -> None:
        machine, job, price = self.machine, self.job, self.price
        # Without the norm to wait for, updates may begin with the backward pass, if slots have memory then.
        before = 0.0 if job.clip else job.backward
        ahead = min(self.slots, int(machine.device_free_backward / self.slot)) * self.slot
        copies = before if ahead >= self.slots * self.slot else 0.0
        up = {route: price[route].h2d for route in _ROUTES}
        down = {route: price[route].d2h_state for route in _ROUTES}
        grads = {route: price[route].d2h_gradient for route in _ROUTES}
        nvme = {route: price[route].nvme for route in _ROUTES}
        both = {route: up[route] + down[route] for route in _ROUTES}
        # The last subgroup still has to leave the device, or to reach it, and be used.
        out = max(self.slot / machine.d2h, self.piece) if self.slots else 0.0
        in_ = self.slot / machine.h2d if self.slots and not ahead else 0.0
        upload = job.param_bytes * self.size / machine.h2d + self.piece if self.cpu else 0.0
        self._row({r: float(not r.on_device) for r in _ROUTES}, machine.cpu_rate, before - upload)
        self._row({r: float(r.on_device) for r in _ROUTES}, machine.device_rate, before)
        self._row({r: up[r] * r.moves_state for r in _ROUTES}, machine.h2d, copies - out, ahead)
        self._row(up, machine.h2d, before, ahead)
        self._row(down, machine.d2h, copies - in_)
        self._row({r: down[r] + grads[r] for r in _ROUTES}, machine.d2h, job.backward)
        self._row({r: both[r] * r.moves_state for r in _ROUTES}, machine.duplex, copies, ahead)
        self._row(both, machine.duplex, before, ahead)
        self._row({r: both[r] + grads[r] for r in _ROUTES}, machine.duplex, job.backward)
        staged = self.host_slots * job.state_bytes() * self.size
        if self.slots and not self.cpu:
            # Nothing runs beside the first fetch and the last flush, so the directions cannot share the link then.
            edges = in_ + self.slot / machine.d2h
            passed = self.slot * (2 if in_ else 1)
            self._row({r: both[r] * r.moves_state for r in _ROUTES}, machine.duplex, copies - edges, ahead + passed)
            if not self.host_slots:
                self._row({r: price[r].dram for r in _ROUTES}, machine.dram, copies - edges, ahead + passed)
        # What host memory carries after the backward pass: all but the gradients' arrival and what came ahead of time.
        late = {r: price[r].dram - (job.grad_bytes if grads[r] else 0) for r in _ROUTES}
        alone = {r: late[r] - nvme[r] - up[r] * r.moves_state for r in _ROUTES}
        self._row({r: late[r] * r.moves_state for r in _ROUTES}, machine.dram, copies, ahead + staged)
        self._row(alone, machine.dram, before)
        self._row({r: alone[r] + up[r] * r.moves_state for r in _ROUTES}, machine.dram, before, ahead)
        self._row(late, machine.dram, before, ahead + staged)
        self._row(nvme, machine.nvme_read, before, staged)
        self._row(nvme, machine.nvme_write, before)

    def _employ_rows(self) -> None:
        """A means that is paid for serves one subgroup at least."""
        for employed, serves in (
            (bool(self.slots), [r.moves_state for r in _ROUTES]),
            (self.cpu, [not r.on_device for r in _ROUTES]),
            (bool(self.host_slots), [r.on_nvme for r in _ROUTES]),
        ):
            if employed:
                self.rows.append([-float(serving) for serving in serves] + [0.0])
                self.limits.append(-1.0 / self.subgroups)

    def _memory_rows(self) -> None:
        machine, price = self.machine, self.price
        staged = self.host_slots * self.job.state_bytes() * self.size
        for room, taken, use in (
            (machine.device_free, self.slots * self.slot, {r: price[r].device_memory for r in _ROUTES}),
            (machine.host_free, staged, {r: price[r].host_memory for r in _ROUTES}),
            (machine.nvme_free, 0.0, {r: price[r].nvme for r in _ROUTES}),
        ):
            self.rows.append([self.job.parameters * use[r] / 1e9 for r in _ROUTES] + [0.0])
            self.limits.append((room - taken) / 1e9)


def no_room(machine: Machine, job: Job) -> UserError:
    """The error for state that fits nowhere, in figures."""
    need = job.state_bytes() * job.parameters
    return UserError(
        f"{need / 1e9:.1f} GB of optimizer state per rank fit neither into {machine.device_free / 1e9:.1f} GB of free "
        f"device memory, nor {machine.host_free / 1e9:.1f} GB of host memory, nor {machine.nvme_free / 1e9:.1f} GB of "
        "NVMe, nor into the three together",
        fix="give an NVMe path with room (offload.nvme_paths), raise offload.host_memory, or use more ranks",
    )

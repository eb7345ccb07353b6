"""Which subgroup takes which route: a linear program, rounding, even interleaving, and known systems by name.

The program minimises the time from the end of the backward pass to the end of the next forward pass, subject to what
each resource can move in that time and to memory. Its optimum bounds every schedule of this kind from below. The
rounded placement is scored by simulation next to the named systems, of which each is one corner of the program:

========================  =====================================================================
zero_offload              every subgroup on the CPU (Ren et al. 2021)
twinflow                  as many as fit stay on the device, the others on the CPU (DeepSpeed)
deep_optimizer_states     every k-th subgroup streamed, the others on the CPU (Maurya et al. 2024)
streamed                  every subgroup streamed
zero_infinity             every subgroup on NVMe, updated by the CPU (Rajbhandari et al. 2021)
resident                  nothing offloaded
========================  =====================================================================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from rewarm.errors import UserError
from rewarm.offload.pipeline import cpu_update_bytes, predict, step_seconds
from rewarm.offload.routes import STATE_BYTES, Job, Machine, Placement, Route, costs, memory, slot_bytes

SIMPLER_IF_WITHIN = 0.03
"""A placement must beat the resident or plain CPU one by this share of the step to be worth its moving parts."""

_ROUTES = tuple(Route)


@dataclass(frozen=True, slots=True)
class Scored:
    """A placement and its prediction."""

    placement: Placement
    seconds: float
    """Predicted seconds per step."""


@dataclass(frozen=True, slots=True)
class Relaxation:
    """Optimum of the linear program."""

    shares: dict[Route, float]
    """Share of the parameters on each route."""
    counts: dict[Route, int]
    """The same in whole subgroups, within memory."""
    seconds: float
    """No placement of this kind takes less per step."""


def subgroup_count(job: Job, size: int) -> int:
    """Subgroups of at most ``size`` parameters."""
    return max(1, math.ceil(job.parameters / size))


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
            program = _Program(machine, job, subgroups, slots if streaming else 0, cpu, host_slots if nvme else 0, split)
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
        self.slot = slot_bytes(job, split) * self.size
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
        staged = self.host_slots * STATE_BYTES * self.size
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
        for room, taken, use in (
            (machine.device_free, self.slots * self.slot, {r: price[r].device_memory for r in _ROUTES}),
            (machine.host_free, self.host_slots * STATE_BYTES * self.size, {r: price[r].host_memory for r in _ROUTES}),
            (machine.nvme_free, 0.0, {r: price[r].nvme for r in _ROUTES}),
        ):
            self.rows.append([self.job.parameters * use[r] / 1e9 for r in _ROUTES] + [0.0])
            self.limits.append((room - taken) / 1e9)


def no_room(machine: Machine, job: Job) -> UserError:
    """The error for state that fits nowhere, in figures."""
    need = STATE_BYTES * job.parameters
    return UserError(
        f"{need / 1e9:.1f} GB of optimizer state per rank fit neither into {machine.device_free / 1e9:.1f} GB of free "
        f"device memory, nor {machine.host_free / 1e9:.1f} GB of host memory, nor {machine.nvme_free / 1e9:.1f} GB of "
        "NVMe, nor into the three together",
        fix="give an NVMe path with room (offload.nvme_paths), raise offload.host_memory, or use more ranks",
    )


def fits(machine: Machine, job: Job, placement: Placement) -> bool:
    """True if a placement has the memory it needs."""
    device, host, nvme = memory(placement, job)
    if machine.nvme_read <= 0 and any(route.on_nvme for route in placement.routes):
        return False
    return device <= machine.device_free and host <= machine.host_free and nvme <= machine.nvme_free


def interleave(counts: dict[Route, int]) -> tuple[Route, ...]:
    """Spread the routes evenly, resident subgroups first: the next forward pass begins with them.

    Each place goes to the route that lags most behind its share (Bresenham); 1 of k streamed gives the stride k.
    """
    moving = {route: count for route, count in counts.items() if count and route is not Route.RESIDENT}
    total = sum(moving.values())
    given = dict.fromkeys(moving, 0)
    order = [Route.RESIDENT] * counts.get(Route.RESIDENT, 0)
    for place in range(1, total + 1):
        route = max(moving, key=lambda route: moving[route] * place / total - given[route])
        given[route] += 1
        order.append(route)
    return tuple(order)


def named(machine: Machine, job: Job, subgroups: int, name: str, **options: int) -> Placement:
    """A known system's placement.

    Args:
        name: a row of the table at the top of this module.
        options: ``stride`` of deep_optimizer_states (default 2), ``resident`` subgroups of twinflow (default: as many
            as fit), and ``slots`` where state is streamed.

    Raises:
        UserError: if the name is not known.
    """
    slots = options.get("slots", 3)
    whole = {"zero_offload": Route.CPU, "streamed": Route.STREAMED, "resident": Route.RESIDENT}
    whole["zero_infinity"] = Route.NVME_CPU
    if name in whole:
        return Placement((whole[name],) * subgroups, slots=slots, name=name)
    if name == "twinflow":
        room = int(machine.device_free / (STATE_BYTES * job.parameters / subgroups))
        resident = min(subgroups, options.get("resident", room))
        routes = (Route.RESIDENT,) * resident + (Route.CPU,) * (subgroups - resident)
        return Placement(routes, slots=slots, name=name)
    if name == "deep_optimizer_states":
        stride = options.get("stride", 2)
        routes = tuple(Route.STREAMED if (i + 1) % stride == 0 else Route.CPU for i in range(subgroups))
        return Placement(routes, slots=slots, name=f"{name} (k={stride})")
    raise UserError(f"no offload placement is called {name!r}", fix=f"use one of {', '.join(sorted(NAMED))}")


NAMED = ("zero_offload", "twinflow", "deep_optimizer_states", "streamed", "zero_infinity", "resident")


def corners(machine: Machine, job: Job, subgroups: int, *, slots: int = 3) -> list[Placement]:
    """Every named system that fits, Deep Optimizer States with several strides."""
    found = [named(machine, job, subgroups, name, slots=slots) for name in NAMED if name != "deep_optimizer_states"]
    for stride in (2, 3, 4, 6, 10):
        found.append(named(machine, job, subgroups, "deep_optimizer_states", stride=stride, slots=slots))
    return [placement for placement in found if fits(machine, job, placement)]


def score(machine: Machine, job: Job, placement: Placement) -> Scored:
    """Predict the seconds of a step, with the best number of updates in the order in which gradients appear."""
    timeline = predict(machine, job, placement)
    others = (job.micro_batches - 1) * (job.forward + job.backward)
    best = Scored(placement, others + timeline.seconds)
    if job.clip and timeline.end_of("gradient") <= timeline.end_of("backward"):
        return best  # nothing waits for a gradient
    for share in (0.25, 0.5, 0.75, 1.0):
        other = replace(placement, early=int(share * len(placement.routes)))
        seconds = step_seconds(machine, job, other)
        if seconds < best.seconds * (1 - 1e-9):
            best = Scored(other, seconds)
    return best


def search(
    machine: Machine, job: Job, subgroups: int, *, slots: int = 3, host_slots: int = 4, split: bool = True
) -> tuple[Scored, Relaxation]:
    """The fastest placement found, never slower than a named system that fits, and the bound it is held against.

    Raises:
        UserError: if the state fits nowhere.
    """
    split = split and job.param_bytes == 2
    try:
        relaxations = relax(machine, job, subgroups, slots=slots, host_slots=host_slots, split=split)
    except UserError:
        if (slots, host_slots) == (2, 2):
            raise
        return search(machine, job, subgroups, slots=2, host_slots=2, split=split)  # smaller buffers may leave room
    found = [score(machine, job, placement) for placement in corners(machine, job, subgroups, slots=slots)]
    for relaxation in relaxations:
        if relaxation.seconds >= min((scored.seconds for scored in found), default=math.inf):
            break
        routes = interleave(relaxation.counts)
        placement = Placement(routes, slots=slots, host_slots=host_slots, split=split, name="auto")
        if fits(machine, job, placement):
            # With all its threads the CPU takes DRAM from the copies; as many as its work needs do not.
            paced = replace(placement, cpu_share=_pace(machine, job, placement, relaxation))
            found += [score(machine, job, choice) for choice in {placement, paced}]
    if not found:
        raise no_room(machine, job)
    best = min(found, key=lambda scored: scored.seconds)
    return _improve(machine, job, best, relaxations[0].seconds), relaxations[0]


def _pace(machine: Machine, job: Job, placement: Placement, relaxation: Relaxation) -> float:
    """Share of the CPU's rate at which its subgroups just take the whole window of the relaxation."""
    others = (job.micro_batches - 1) * (job.forward + job.backward)
    window = relaxation.seconds - others - (job.backward if job.clip else 0.0)
    share = sum(not route.on_device for route in placement.routes) / len(placement.routes)
    return min(1.0, max(0.05, 1.03 * share * job.parameters / machine.cpu_rate / window))


def _improve(machine: Machine, job: Job, best: Scored, bound: float) -> Scored:
    """Move subgroups between routes, and change the CPU's share, while that helps and the bound is not reached."""
    stride = max(1, len(best.placement.routes) // 16)
    while best.seconds > bound * 1.01:
        better = best
        for placement in _neighbours(best.placement, stride):
            if fits(machine, job, placement):
                tried = Scored(placement, step_seconds(machine, job, placement))
                better = min(better, tried, key=lambda scored: scored.seconds)
        if better.seconds < best.seconds * 0.999:
            best = better
        elif stride > 1:
            stride = 1
        else:
            return best
    return best


def _neighbours(placement: Placement, stride: int) -> Iterator[Placement]:
    counts = {route: placement.count(route) for route in _ROUTES}
    used = [route for route in _ROUTES if counts[route]]
    for donor, taker in itertools.permutations(used, 2):
        step = min(stride, counts[donor])
        moved = {**counts, donor: counts[donor] - step, taker: counts[taker] + step}
        yield replace(placement, routes=interleave(moved), name="auto")
    if any(not route.on_device for route in used) and len(used) > 1:
        factor = 0.7 if stride > 1 else 0.92
        for share in (placement.cpu_share * factor, placement.cpu_share / factor):
            if share > 0.05:
                yield replace(placement, cpu_share=min(1.0, share), name="auto")


def place(
    machine: Machine, job: Job, subgroups: int, *, slots: int = 3, host_slots: int = 4, split: bool = True
) -> tuple[Scored, Relaxation]:
    """The placement to use: the fastest, or a simpler one that is nearly as fast.

    Raises:
        UserError: if the state fits nowhere.
    """
    best, relaxation = search(machine, job, subgroups, slots=slots, host_slots=host_slots, split=split)
    for name in ("resident", "zero_offload"):
        simple = named(machine, job, subgroups, name)
        if fits(machine, job, simple):
            scored = score(machine, job, simple)
            if scored.seconds * (1 - SIMPLER_IF_WITHIN) <= best.seconds:
                return scored, relaxation
    return best, relaxation


def exposed_seconds(machine: Machine, job: Job, placement: Placement) -> float:
    """Seconds that the update adds to a step."""
    return predict(machine, job, placement).seconds - job.forward - job.backward


def update_seconds(machine: Machine, job: Job, placement: Placement) -> float:
    """Seconds from the end of the backward pass to the end of the last update, copy or write."""
    timeline = predict(machine, job, placement)
    kinds = ("update", "upload", "flush", "write")
    return max(timeline.end_of(kind) for kind in kinds) - timeline.end_of("backward")


__all__ = [
    "NAMED",
    "Relaxation",
    "Scored",
    "corners",
    "cpu_update_bytes",
    "exposed_seconds",
    "fits",
    "interleave",
    "named",
    "no_room",
    "place",
    "relax",
    "score",
    "search",
    "subgroup_count",
    "update_seconds",
]

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

from rewarm.errors import UserError
from rewarm.offload.planning.pipeline import predict, step_seconds
from rewarm.offload.planning.relaxation import Relaxation, no_room, relax
from rewarm.offload.planning.routes import Job, Machine, Placement, Route, memory

SIMPLER_IF_WITHIN = 0.03
"""A placement must beat the resident or plain CPU one by this share of the step to be worth its moving parts."""

_ROUTES = tuple(Route)


@dataclass(frozen=True, slots=True)
class Scored:
    """A placement and its prediction."""

    placement: Placement
    seconds: float
    """Predicted seconds per step."""


def subgroup_count(job: Job, size: int) -> int:
    """Subgroups of at most ``size`` parameters."""
    return max(1, math.ceil(job.parameters / size))


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
        room = int(machine.device_free / (job.resident_bytes * job.parameters / subgroups))
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
    split = split and job.can_split
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
    bound = relaxations[0].seconds
    best = min(found, key=lambda scored: scored.seconds)
    # A start that is slower now may end faster: all within reach of the best are improved.
    starts = [scored for scored in found if scored.placement.name == "auto" and scored.seconds < 1.1 * best.seconds]
    ends = [_improve(machine, job, start, bound) for start in starts]
    return min([best, *ends], key=lambda scored: scored.seconds), relaxations[0]


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


def update_seconds(machine: Machine, job: Job, placement: Placement) -> float:
    """Seconds from the end of the backward pass to the end of the last update, copy or write."""
    timeline = predict(machine, job, placement)
    kinds = ("update", "upload", "flush", "write")
    return max(timeline.end_of(kind) for kind in kinds) - timeline.end_of("backward")

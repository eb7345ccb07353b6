"""A fluid event simulator of one step: tasks on streams that share bandwidth (numpy only).

A stream is a CUDA stream or a thread: its tasks run one after another, in the order given. A task also draws on shared
resources (a PCIe direction, DRAM, an NVMe path) at a rate that its speed implies; when the running tasks ask for more
than a resource has, all of them slow down alike (max-min fairness). The same tasks are what
:mod:`rewarm.offload.runtime.execute` runs with threads, so what is scored here is what happens there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

_EPSILON = 1e-12
_ORDER = (
    ("backward", "gradient"),
    ("gradient", "update"),
    ("read", "fetch"),
    ("read", "update"),
    ("fetch", "update"),
    ("update", "upload"),
    ("update", "flush"),
    ("update", "write"),
    ("flush", "write"),
)
"""What must have ended before what begins, for each subgroup."""


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work."""

    kind: str
    """What it does: backward, gradient, barrier, fetch, read, update, flush, write, upload, forward."""
    stream: str
    """The stream or thread that runs it."""
    seconds: float
    """Time it takes alone."""
    uses: Mapping[str, float] = field(default_factory=dict)
    """Shared resource -> amount it consumes in all (bytes)."""
    after: tuple[int, ...] = ()
    """Indices of tasks that must have ended."""
    subgroup: int | None = None
    """The subgroup it works on."""
    slot: int | None = None
    """The device buffer it fills, works in or empties."""
    host_slot: int | None = None
    """The host staging buffer it fills, works in or empties."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each task ran."""

    tasks: tuple[Task, ...]
    start: tuple[float, ...]
    """Seconds from the start of the backward pass."""
    end: tuple[float, ...]
    """Seconds from the start of the backward pass."""

    @property
    def seconds(self) -> float:
        """End of the last task."""
        return max(self.end, default=0.0)

    def end_of(self, kind: str) -> float:
        """End of the last task of a kind, 0 if there is none."""
        return max((end for task, end in zip(self.tasks, self.end, strict=True) if task.kind == kind), default=0.0)

    def busy(self, stream: str) -> float:
        """Seconds in which a stream ran a task."""
        rows = zip(self.tasks, self.start, self.end, strict=True)
        return sum(end - start for task, start, end in rows if task.stream == stream)

    def used(self, resource: str) -> float:
        """Amount drawn from a shared resource."""
        return sum(task.uses.get(resource, 0.0) for task in self.tasks)


def simulate(tasks: Sequence[Task], capacities: Mapping[str, float]) -> Timeline:
    """Run the tasks.

    Args:
        tasks: in the order in which each stream takes its own.
        capacities: shared resource -> amount per second; a resource not named is unlimited.

    Raises:
        AssertionError: if the tasks wait for each other in a circle.
    """
    return _Run(tasks, capacities).result()


class _Run:
    def __init__(self, tasks: Sequence[Task], capacities: Mapping[str, float]) -> None:
        self.tasks = tuple(tasks)
        count = len(self.tasks)
        self.limits = dict(capacities)
        self.waiting = [len(set(task.after)) for task in self.tasks]
        self.followers: list[list[int]] = [[] for _ in range(count)]
        streams: dict[str, list[int]] = {}
        # Subgroups of a route ask for the same: speeds are worked out once for each set of demands that meets.
        self.demand: list[int] = []
        kinds: dict[tuple[tuple[str, float], ...], int] = {}
        for index, task in enumerate(self.tasks):
            for earlier in set(task.after):
                self.followers[earlier].append(index)
            streams.setdefault(task.stream, []).append(index)
            rates = task.uses.items() if task.seconds > 0 else ()
            demand = tuple((name, amount / task.seconds) for name, amount in rates if name in self.limits)
            self.demand.append(kinds.setdefault(demand, len(kinds)))
        self.demands = list(kinds)
        self.known: dict[tuple[int, ...], list[float]] = {}
        self.next_in_stream = {a: b for queue in streams.values() for a, b in pairwise(queue)}
        self.heads = {queue[0] for queue in streams.values()}
        self.left = [task.seconds for task in self.tasks]
        self.start = [0.0] * count
        self.end = [0.0] * count
        self.active: list[int] = []
        self.done = 0

    def result(self) -> Timeline:
        now = 0.0
        self._admit(list(self.heads), now)
        while self.done < len(self.tasks):
            assert self.active, "tasks wait for each other in a circle: " + self._blocked()
            speeds = self._speeds()
            step = min(self.left[i] / speed for i, speed in zip(self.active, speeds, strict=True))
            now += step
            for i, speed in zip(self.active, speeds, strict=True):
                self.left[i] -= speed * step
            ended = [i for i in self.active if self.left[i] <= _EPSILON]
            self.active = [i for i in self.active if self.left[i] > _EPSILON]
            self._finish(ended, now)
        return Timeline(self.tasks, tuple(self.start), tuple(self.end))

    def _admit(self, candidates: list[int], now: float) -> None:
        """Start those heads of streams that wait for nothing; those that take no time end at once."""
        instant: list[int] = []
        for i in candidates:
            if i in self.heads and self.waiting[i] == 0:
                self.heads.discard(i)
                self.start[i] = now
                (self.active if self.left[i] > _EPSILON else instant).append(i)
        if instant:
            self._finish(instant, now)

    def _finish(self, ended: list[int], now: float) -> None:
        freed = []
        for i in ended:
            self.end[i] = now
            self.done += 1
            for follower in self.followers[i]:
                self.waiting[follower] -= 1
                freed.append(follower)
            if (successor := self.next_in_stream.get(i)) is not None:
                self.heads.add(successor)
                freed.append(successor)
        if freed:
            self._admit(freed, now)

    def _speeds(self) -> list[float]:
        """Speed of each active task as a share of its speed alone."""
        meeting = tuple([self.demand[i] for i in self.active])
        speeds = self.known.get(meeting)
        if speeds is None:
            speeds = self.known[meeting] = fair_speeds([self.demands[kind] for kind in meeting], self.limits)
        return speeds

    def _blocked(self) -> str:
        names = [f"{self.tasks[i].kind} of subgroup {self.tasks[i].subgroup}" for i in sorted(self.heads)[:4]]
        return ", ".join(names)


def fair_speeds(demands: Sequence[Sequence[tuple[str, float]]], limits: Mapping[str, float]) -> list[float]:
    """Max-min fair speeds of tasks that share resources.

    Args:
        demands: for each task, (resource, amount per second at full speed).
        limits: resource -> amount per second.

    Returns:
        For each task, its speed as a share of full speed.
    """
    speeds = [1.0] * len(demands)
    growing = [i for i, demand in enumerate(demands) if demand]
    room = dict(limits)
    level = 0.0
    while growing:
        asked: dict[str, float] = {}
        for i in growing:
            for name, rate in demands[i]:
                asked[name] = asked.get(name, 0.0) + rate
        rise, tightest = min((room[name] / rate, name) for name, rate in asked.items() if rate > 0)
        if level + rise >= 1.0:
            break
        level += rise
        for name, rate in asked.items():
            room[name] -= rate * rise
        for i in [i for i in growing if any(name == tightest for name, _ in demands[i])]:
            speeds[i] = max(level, _EPSILON)
            growing.remove(i)
    return speeds


def check(timeline: Timeline, subgroups: int) -> None:
    """Assert that a timeline is a complete and legal step.

    Every subgroup is updated exactly once, after its gradient and its state are there; what was fetched or read is
    flushed or written once, after the update; no slot is filled before it was emptied; the next forward pass of a
    subgroup begins after its update has reached the device.
    """
    tasks, by_kind = timeline.tasks, _by_kind(timeline)
    assert sorted(by_kind["update"]) == list(range(subgroups)), "a subgroup is not updated exactly once"
    for there, back in (("fetch", "flush"), ("read", "write")):
        assert by_kind.get(there, {}).keys() == by_kind.get(back, {}).keys(), f"a {there} without {back}"
    for earlier, later in _ORDER:
        for subgroup, index in by_kind.get(later, {}).items():
            before = by_kind.get(earlier, {}).get(subgroup)
            assert before is None or timeline.end[before] <= timeline.start[index] + 1e-9, (earlier, later, subgroup)
    for subgroup, index in by_kind.get("forward", {}).items():
        ready = by_kind.get("upload", {}).get(subgroup, by_kind["update"][subgroup])
        assert timeline.end[ready] <= timeline.start[index] + 1e-9, f"forward of {subgroup} before its parameters"
    for kind in ("slot", "host_slot"):
        spans: dict[int, dict[int, tuple[float, float]]] = {}
        for index, task in enumerate(tasks):
            number = getattr(task, kind)
            if number is None or task.subgroup is None:
                continue
            first, last = spans.setdefault(number, {}).get(task.subgroup, (float("inf"), 0.0))
            spans[number][task.subgroup] = (min(first, timeline.start[index]), max(last, timeline.end[index]))
        for number, users in spans.items():
            ordered = sorted(users.values())
            for (_, last), (first, _) in pairwise(ordered):
                assert last <= first + 1e-9, f"{kind} {number} is reused before it is empty"


def _by_kind(timeline: Timeline) -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {"update": {}}
    for index, task in enumerate(timeline.tasks):
        if task.subgroup is not None:
            place = found.setdefault(task.kind, {})
            assert task.subgroup not in place, f"{task.kind} of subgroup {task.subgroup} happens twice"
            place[task.subgroup] = index
    return found


def chrome_trace(timeline: Timeline) -> str:
    """The timeline as a Chrome trace (open it in ui.perfetto.dev or chrome://tracing)."""
    streams = list(dict.fromkeys(task.stream for task in timeline.tasks))
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "tid": number, "name": "thread_name", "args": {"name": stream}}
        for number, stream in enumerate(streams)
    ]
    for task, start, end in zip(timeline.tasks, timeline.start, timeline.end, strict=True):
        name = task.kind if task.subgroup is None else f"{task.kind} {task.subgroup}"
        details = {"subgroup": task.subgroup, "slot": task.slot, "host_slot": task.host_slot, "alone": task.seconds}
        event = {"ph": "X", "pid": 0, "tid": streams.index(task.stream), "name": name, "cat": task.kind}
        events.append({**event, "ts": start * 1e6, "dur": (end - start) * 1e6, "args": details})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def draw(timeline: Timeline, path: Path, title: str) -> None:
    """Draw the timeline as a Gantt chart, one row per stream, one colour per kind of task."""
    from matplotlib.figure import Figure

    streams = list(dict.fromkeys(task.stream for task in timeline.tasks))
    kinds = list(dict.fromkeys(task.kind for task in timeline.tasks))
    figure = Figure(figsize=(12, 1.2 + 0.45 * len(streams)), layout="constrained")
    axes = figure.subplots()
    for number, kind in enumerate(kinds):
        rows = [
            (streams.index(task.stream), start, end - start)
            for task, start, end in zip(timeline.tasks, timeline.start, timeline.end, strict=True)
            if task.kind == kind
        ]
        positions, left, width = zip(*rows, strict=True)
        axes.barh(positions, width, left=left, color=f"C{number}", edgecolor="white", linewidth=0.3, label=kind)
    axes.set_yticks(range(len(streams)), streams)
    axes.invert_yaxis()
    axes.set_xlabel("seconds from the start of the backward pass")
    axes.set_title(title)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=len(kinds), frameon=False)
    figure.savefig(path, dpi=150)

"""The fluid simulator against times worked out by hand, and its checks against broken timelines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.offload.planning.pipeline import predict
from rewarm.offload.planning.placement import interleave
from rewarm.offload.planning.routes import Job, Machine, Placement, Route
from rewarm.offload.planning.simulate import Task, Timeline, check, chrome_trace, draw, fair_speeds, simulate

MACHINE = Machine(
    h2d=10e9,
    d2h=9e9,
    duplex=15e9,
    dram=60e9,
    cpu_rate=1e9,
    device_rate=20e9,
    device_free=6e9,
    host_free=1e12,
    nvme_read=3e9,
    nvme_write=2e9,
    nvme_free=1e12,
)
JOB = Job(1_000_000_000, forward=0.2, backward=0.4)


def test_tasks_of_a_stream_follow_each_other_and_streams_run_together() -> None:
    tasks = [Task("a", "x", 1.0), Task("b", "x", 2.0), Task("c", "y", 1.5), Task("d", "y", 1.0, after=(1,))]
    timeline = simulate(tasks, {})
    assert timeline.end == pytest.approx((1.0, 3.0, 1.5, 4.0))
    assert timeline.busy("y") == pytest.approx(2.5)


def test_two_copies_share_a_link_and_the_rest_speeds_up_when_one_ends() -> None:
    # Each alone takes 1 s at 10 B/s. Together they have 12 B/s: 6 B/s each, until the shorter ends.
    tasks = [Task("a", "up", 1.0, {"link": 10.0}), Task("b", "down", 0.5, {"link": 5.0})]
    timeline = simulate(tasks, {"link": 12.0})
    assert timeline.end[1] == pytest.approx(5 / 6)
    assert timeline.end[0] == pytest.approx(5 / 6 + 5 / 10)


def test_a_task_that_asks_for_little_is_not_slowed_by_another_resource() -> None:
    speeds = fair_speeds([[("a", 8.0)], [("a", 8.0), ("b", 1.0)], [("b", 1.0)]], {"a": 8.0, "b": 10.0})
    assert speeds == pytest.approx([0.5, 0.5, 1.0])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=6),
    st.floats(0.5, 20),
    st.floats(0.5, 20),
)
def test_no_resource_is_overdrawn_and_none_is_left_idle(
    demands: list[tuple[float, float]], first: float, second: float
) -> None:
    tasks = [[("x", a), ("y", b)] for a, b in demands]
    limits = {"x": first, "y": second}
    speeds = fair_speeds(tasks, limits)
    used = {name: sum(speed * dict(task)[name] for speed, task in zip(speeds, tasks, strict=True)) for name in limits}
    assert all(used[name] <= limits[name] * (1 + 1e-9) for name in limits)
    full = any(used[name] >= limits[name] * (1 - 1e-9) for name in limits)
    assert full or speeds == [1.0] * len(tasks)


def test_a_circle_of_waiting_tasks_is_named() -> None:
    tasks = [Task("a", "x", 1.0, after=(1,), subgroup=3), Task("b", "x", 1.0)]
    with pytest.raises(AssertionError, match="a of subgroup 3"):
        simulate(tasks, {})


def test_all_on_the_cpu_takes_what_the_arithmetic_says() -> None:
    job = replace(JOB, forward=0.0)
    placement = Placement((Route.CPU,) * 10)
    timeline = predict(replace(MACHINE, dram=1e15), job, placement)
    check(timeline, 10)
    gradient, upload = 2 * 1e8 / MACHINE.d2h, 2 * 1e8 / MACHINE.h2d  # of the first subgroup, and of the last
    assert timeline.seconds == pytest.approx(job.backward + gradient + 1.0 + upload)
    assert timeline.used("d2h") == pytest.approx(2e9)
    assert timeline.used("h2d") == pytest.approx(2e9)


def test_all_streamed_through_two_slots_alternates_fetch_and_flush() -> None:
    job = replace(JOB, forward=0.0)
    machine = replace(MACHINE, dram=1e15, duplex=1e15, device_rate=1e15, d2h=10e9)
    timeline = predict(machine, job, Placement((Route.STREAMED,) * 10, slots=2))
    check(timeline, 10)
    piece = 12 * 1e8 / 10e9
    assert timeline.seconds == pytest.approx(job.backward + 11 * piece)
    single = predict(machine, job, Placement((Route.STREAMED,) * 10, slots=1))
    assert single.seconds == pytest.approx(job.backward + 20 * piece)


def test_dram_slows_the_cpu_under_copies() -> None:
    placement = Placement(interleave({Route.CPU: 10, Route.STREAMED: 10}))
    free = predict(replace(MACHINE, dram=1e15), JOB, placement)
    tight = predict(replace(MACHINE, dram=30e9), JOB, placement)
    assert tight.busy("cpu") > 1.1 * free.busy("cpu")
    total = tight.used("dram")
    assert tight.seconds >= total / 30e9 * (1 - 1e-9)


def test_the_next_forward_pass_hides_the_tail() -> None:
    placement = Placement((Route.CPU,) * 20)
    hidden = predict(MACHINE, JOB, placement)
    update = hidden.end_of("upload") - JOB.backward
    assert hidden.seconds < JOB.backward + update + JOB.forward - 0.8 * JOB.forward


ROUTES = st.lists(st.sampled_from(list(Route)), min_size=1, max_size=24)


@settings(max_examples=80, deadline=None)
@given(
    routes=ROUTES,
    slots=st.integers(1, 4),
    host_slots=st.integers(1, 4),
    clip=st.booleans(),
    split=st.booleans(),
    wide=st.booleans(),
    ahead=st.booleans(),
    early=st.integers(0, 24),
)
def test_every_mixture_is_complete_and_legal(
    routes: list[Route], slots: int, host_slots: int, clip: bool, split: bool, wide: bool, ahead: bool, early: int
) -> None:
    job = replace(JOB, clip=clip, param_bytes=4 if wide else 2)
    machine = replace(MACHINE, device_free_backward=1e12 if ahead else 0.0)
    placement = Placement(tuple(routes), slots, host_slots, split, early=min(early, len(routes)))
    check(predict(machine, job, placement), len(routes))


def broken(timeline: Timeline, kind: str, *, start: float | None = None, drop: bool = False) -> Timeline:
    """The timeline with the last task of a kind moved or left out."""
    i = max(i for i, task in enumerate(timeline.tasks) if task.kind == kind)
    rows = list(zip(timeline.tasks, timeline.start, timeline.end, strict=True))
    if drop:
        del rows[i]
    else:
        task, first, last = rows[i]
        assert start is not None
        rows[i] = (task, start, start + last - first)
    tasks, starts, ends = zip(*rows, strict=True)
    return Timeline(tasks, starts, ends)


def test_the_check_finds_what_it_is_for() -> None:
    routes = interleave({Route.CPU: 4, Route.STREAMED: 6, Route.NVME_CPU: 4})
    timeline = predict(MACHINE, JOB, Placement(routes, slots=2, host_slots=2))
    check(timeline, 14)
    with pytest.raises(AssertionError, match="not updated exactly once"):
        check(broken(timeline, "update", drop=True), 14)
    with pytest.raises(AssertionError, match="fetch without flush"):
        check(broken(timeline, "flush", drop=True), 14)
    with pytest.raises(AssertionError, match="read without write"):
        check(broken(timeline, "write", drop=True), 14)
    with pytest.raises(AssertionError, match="fetch"):
        check(broken(timeline, "fetch", start=timeline.seconds), 14)
    with pytest.raises(AssertionError, match=r"slot \d is reused"):
        check(broken(timeline, "fetch", start=0.0), 14)
    with pytest.raises(AssertionError, match="before its parameters"):
        check(broken(timeline, "forward", start=0.0), 14)
    twice = replace(timeline.tasks[-1], kind="update", subgroup=0)
    again = Timeline((*timeline.tasks, twice), (*timeline.start, 0.0), (*timeline.end, 0.0))
    with pytest.raises(AssertionError, match="happens twice"):
        check(again, 14)


def test_the_trace_and_the_chart_show_every_task(tmp_path: Path) -> None:
    timeline = predict(MACHINE, JOB, Placement(interleave({Route.CPU: 3, Route.STREAMED: 3})))
    events = json.loads(chrome_trace(timeline))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(timeline.tasks)
    assert max(event["ts"] + event["dur"] for event in spans) == pytest.approx(timeline.seconds * 1e6)
    draw(timeline, tmp_path / "step.png", "one step")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")

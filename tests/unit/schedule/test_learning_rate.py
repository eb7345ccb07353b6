"""The schedule against closed forms written out here, and its properties on any configuration."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.config.training import ScheduleConfig
from rewarm.errors import UserError
from rewarm.schedule.learning_rate import LearningRate

TOKENS_PER_STEP = 48


def rates(config: ScheduleConfig, num_steps: int) -> list[float]:
    """The rate of every step, and behind them the one that the run ends at."""
    schedule = LearningRate(config, num_steps * TOKENS_PER_STEP, TOKENS_PER_STEP)
    return [schedule.at(step * TOKENS_PER_STEP) for step in range(num_steps + 1)]


def test_cosine_closed_form() -> None:
    """eta_min + (eta_max - eta_min)/2 (1 + cos(pi x)) after a linear warm-up."""
    config = ScheduleConfig(kind="cosine", peak=3e-4, minimum=3e-5, start=1e-5, warmup="10 steps")
    found = rates(config, 110)
    for step in range(10):
        assert found[step] == pytest.approx(1e-5 + (3e-4 - 1e-5) * (step + 1) / 10, rel=1e-12)
    for step in range(10, 111):
        expected = 3e-5 + 0.5 * (3e-4 - 3e-5) * (1 + math.cos(math.pi * (step - 10) / 100))
        assert found[step] == pytest.approx(expected, rel=1e-12)
    assert found[9] == found[10] == 3e-4
    assert found[110] == 3e-5


def test_linear_to_zero_wastes_no_step() -> None:
    found = rates(ScheduleConfig(kind="linear", peak=1.0, minimum=0.0, warmup="0 steps"), 8)
    assert found == [1 - step / 8 for step in range(9)]
    assert min(found[:-1]) > 0


@pytest.mark.parametrize(
    ("shape", "minimum", "share"),
    [
        ("linear", 0.0, lambda x: 1 - x),
        ("one_minus_sqrt", 0.0, lambda x: 1 - x**0.5),
        ("cosine", 0.0, lambda x: math.cos(math.pi * x / 2) ** 2),
        ("exponential", 1e-2, lambda x: math.exp(x * math.log(1e-2))),
    ],
)
def test_wsd_closed_forms(shape: Any, minimum: float, share: Any) -> None:
    config = ScheduleConfig(kind="wsd", peak=1.0, minimum=minimum, warmup="5%", decay="20%", decay_shape=shape)
    found = rates(config, 100)
    assert found[4:81] == [1.0] * 77
    for step in range(80, 101):
        assert found[step] == pytest.approx(share((step - 80) / 20), abs=1e-12)


def test_infinite_closed_form() -> None:
    """Warm-up, cosine cooldown to the plateau, constant, exponential anneal (Ibrahim et al. 2024, section 4.3)."""
    config = ScheduleConfig(kind="infinite", peak=3e-4, plateau=1.65e-4, minimum=3e-5, warmup="10%", cooldown="50%",
                            decay="15%", decay_shape="exponential")  # fmt: skip
    found = rates(config, 100)
    assert found[9] == found[10] == 3e-4
    for step in range(10, 60):
        x = (step - 10) / 50
        assert found[step] == pytest.approx(1.65e-4 + 0.5 * (3e-4 - 1.65e-4) * (1 + math.cos(math.pi * x)), rel=1e-12)
    assert found[60:86] == [1.65e-4] * 26
    for step in range(85, 101):
        assert found[step] == pytest.approx(1.65e-4 * (3e-5 / 1.65e-4) ** ((step - 85) / 15), rel=1e-12)


def test_infinite_stages_join_at_the_plateau() -> None:
    """A stage without an anneal ends at the rate that a constant stage continues from."""
    first = ScheduleConfig(kind="infinite", peak=3e-4, plateau=1e-4, decay="0 steps")
    second = ScheduleConfig(kind="constant", peak=1e-4, warmup="0 steps")
    assert rates(first, 50)[-1] == rates(second, 50)[0] == 1e-4


def test_lower_starting_rate_without_warm_up() -> None:
    """Continuing from the pre-training's final rate with no warm-up: a cosine whose peak is that rate."""
    found = rates(ScheduleConfig(kind="cosine", peak=3e-5, minimum=3e-7, warmup="0 steps"), 20)
    assert found[0] == 3e-5 and found[-1] == 3e-7


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleConfig, int]:
    kind = draw(st.sampled_from(["constant", "cosine", "linear", "wsd", "infinite"]))
    num_steps = draw(st.integers(8, 60))
    peak = draw(st.floats(1e-6, 1e-1))
    values: dict[str, Any] = {"kind": kind, "peak": peak, "warmup": f"{draw(st.integers(0, num_steps // 4))} steps"}
    if not values["warmup"].startswith("0 "):
        values["start"] = peak * draw(st.floats(0, 1))
    if kind != "constant":
        values["minimum"] = peak * draw(st.floats(1e-3, 0.2))
    if kind in ("wsd", "infinite"):
        values["decay"] = f"{draw(st.integers(1, num_steps // 4))} steps"
        values["decay_shape"] = draw(st.sampled_from(["linear", "one_minus_sqrt", "cosine", "exponential"]))
    if kind == "infinite":
        values["plateau"] = peak * draw(st.floats(0.3, 1))
        if values["plateau"] < peak:  # else there is nothing to cool down, and its length is refused
            values["cooldown"] = f"{draw(st.integers(1, num_steps // 4))} steps"
    return ScheduleConfig(**values), num_steps


@given(schedules())
def test_rises_then_falls_between_its_ends(case: tuple[ScheduleConfig, int]) -> None:
    config, num_steps = case
    found = rates(config, num_steps)
    warm = int(config.warmup.split()[0])
    slack = 1e-12 * config.peak
    assert all(one <= other + slack for one, other in pairwise(found[:warm]))
    assert all(one + slack >= other for one, other in pairwise(found[warm:]))
    assert all(min(config.start, config.minimum) <= rate <= config.peak for rate in found)
    assert min(found[:-1]) > 0
    assert max(found) == config.peak
    if config.kind != "constant":
        assert found[-1] == config.minimum


@given(schedules())
def test_phases_cover_the_run_and_meet(case: tuple[ScheduleConfig, int]) -> None:
    config, num_steps = case
    phases = LearningRate(config, num_steps * TOKENS_PER_STEP, TOKENS_PER_STEP).phases
    assert phases[0].begin == 0 and phases[-1].end == num_steps * TOKENS_PER_STEP
    for one, other in pairwise(phases):
        assert one.end == other.begin
        assert one.last == other.first
        assert one.at(one.end) == pytest.approx(other.at(other.begin), rel=1e-12)


@given(schedules(), st.integers(2, 4))
def test_finer_steps_read_the_same_curve(case: tuple[ScheduleConfig, int], parts: int) -> None:
    """After the warm-up the rate belongs to the token count, not to the size of the step."""
    config, num_steps = case
    total = num_steps * TOKENS_PER_STEP
    values = config.model_dump()
    for name in ("warmup", "decay", "cooldown"):
        if values[name].endswith("steps"):
            values[name] = f"{int(values[name].split()[0]) * TOKENS_PER_STEP} tokens"
    coarse = LearningRate(config, total, TOKENS_PER_STEP)
    fine = LearningRate(ScheduleConfig(**values), total, TOKENS_PER_STEP // parts)
    for step in range(int(config.warmup.split()[0]), num_steps + 1):
        assert fine.at(step * TOKENS_PER_STEP) == coarse.at(step * TOKENS_PER_STEP)


def test_past_the_end_the_final_rate_stays() -> None:
    schedule = LearningRate(ScheduleConfig(kind="cosine", minimum=1e-5), 4800, 48)
    assert schedule.at(4800) == schedule.at(10_000) == 1e-5


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "wsd", "warmup": "30 steps", "decay": "80%"}, ["schedule.warmup=30 steps", "schedule.decay=80%"]),
        (
            {"kind": "infinite", "plateau": 1e-4, "warmup": "30%", "cooldown": "40%", "decay": "40%"},
            ["schedule.warmup=30%", "schedule.cooldown=40%", "schedule.decay=40%", "110 steps", "100"],
        ),
        ({"kind": "cosine", "warmup": "101 steps"}, ["schedule.warmup=101 steps", "100"]),
    ],
)
def test_phases_that_do_not_fit_are_named(values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        LearningRate(ScheduleConfig(**values), 100 * TOKENS_PER_STEP, TOKENS_PER_STEP)
    assert all(part in str(refused.value) for part in named)


def test_a_run_of_one_step_trains_at_the_peak() -> None:
    assert rates(ScheduleConfig(kind="cosine", peak=3e-4), 1)[0] == 3e-4


def test_fingerprint_tells_schedules_apart_and_only_them() -> None:
    def fingerprint(num_steps: int = 100, **values: Any) -> str:
        return LearningRate(ScheduleConfig(**values), num_steps * 48, 48).fingerprint()

    base = fingerprint(kind="cosine", warmup="1%")
    assert base == fingerprint(kind="cosine", warmup="1 steps")  # two ways to write one schedule
    others = [
        fingerprint(kind="linear", warmup="1%"),
        fingerprint(kind="cosine", warmup="2%"),
        fingerprint(kind="cosine", peak=math.nextafter(3e-4, 1)),
        fingerprint(kind="cosine", minimum=1e-9),
        fingerprint(kind="cosine", num_steps=101, warmup="1 steps"),
    ]
    assert len({base, *others}) == len(others) + 1


def test_describe_names_every_phase() -> None:
    config = ScheduleConfig(kind="infinite", peak=3e-4, plateau=1e-4, minimum=1e-5, decay_shape="linear")
    text = LearningRate(config, 1000 * 48, 48).describe()
    assert text == (
        "warm-up 0 to 0.0003 over 10 steps, cosine to 0.0001 over 400 steps, constant 0.0001 over 390 steps, "
        "linear to 1e-05 over 200 steps"
    )


def test_a_phase_is_described_in_steps() -> None:
    config = ScheduleConfig(kind="wsd", peak=1.0, minimum=0.5, warmup="24 tokens", decay="1 steps")
    text = LearningRate(config, 4 * TOKENS_PER_STEP, TOKENS_PER_STEP).describe()
    assert text == "warm-up 0 to 1 over 1 step, constant 1 over 2 steps, one minus sqrt to 0.5 over 1 step"
    bare = ScheduleConfig(kind="cosine", peak=1.0, minimum=0.5, warmup="0 steps")
    assert LearningRate(bare, 2 * TOKENS_PER_STEP, TOKENS_PER_STEP).describe() == "cosine 1 to 0.5 over 2 steps"


def test_the_fingerprint_is_that_of_the_phases_written_out() -> None:
    """Runs compare it with one that an earlier version may have written."""
    config = ScheduleConfig(kind="cosine", peak=1.0, minimum=0.5, warmup="1 steps")
    text = (
        '{"version": 1, "tokens_per_step": 48, "phases": [["warmup", 0, 48, "0x0.0p+0", "0x1.0000000000000p+0"], '
        '["cosine", 48, 192, "0x1.0000000000000p+0", "0x1.0000000000000p-1"]]}'
    )
    assert LearningRate(config, 192, 48).fingerprint() == hashlib.sha256(text.encode()).hexdigest()


def test_phases_that_do_not_fit_are_counted_in_steps() -> None:
    config = ScheduleConfig(kind="wsd", peak=1.0, minimum=0.5, warmup="3 steps", decay="2 steps")
    with pytest.raises(UserError) as caught:
        LearningRate(config, 4 * TOKENS_PER_STEP, TOKENS_PER_STEP)
    assert caught.value.message == (
        "schedule.warmup=3 steps (3 steps) and schedule.decay=2 steps (2 steps) need 5 steps, but the run has 4"
    )


def test_no_tokens_a_step_and_tokens_below_zero_are_broken_invariants() -> None:
    config = ScheduleConfig(kind="constant", peak=1.0)
    for total, per_step in ((48, 0), (47, 48)):
        with pytest.raises(AssertionError):
            LearningRate(config, total, per_step)
    with pytest.raises(AssertionError):
        LearningRate(config, 480, 48).at(-1)

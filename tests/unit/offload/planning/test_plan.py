"""Settings become the placements they name; what cannot be is refused in figures; drift is noticed, noise is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from rewarm.config.offload import OffloadConfig
from rewarm.errors import UserError
from rewarm.offload.planning.pipeline import predict
from rewarm.offload.planning.plan import Drift, moved, plan, update_seconds
from rewarm.offload.planning.routes import Job, Machine, Placement, Route
from rewarm.offload.runtime.device import ThrottledDevice
from rewarm.offload.runtime.profile import Profile, cache_path, describe, load, measure

MACHINE = Machine(
    h2d=25e9,
    d2h=25e9,
    duplex=40e9,
    dram=80e9,
    cpu_rate=2e9,
    device_rate=40e9,
    device_free=8e9,
    host_free=60e9,
    nvme_read=6e9,
    nvme_write=4e9,
    nvme_free=1e12,
)
JOB = Job(2_000_000_000, forward=0.1, backward=0.2)


@pytest.mark.parametrize(
    ("settings", "route", "count"),
    [
        ({"mode": "cpu"}, Route.CPU, 40),
        ({"mode": "streamed"}, Route.STREAMED, 40),
        ({"mode": "deep_optimizer_states", "stride": 4}, Route.STREAMED, 10),
        ({"mode": "twinflow", "resident_fraction": 0.25}, Route.RESIDENT, 10),
        ({"mode": "nvme", "nvme_paths": ["/local"]}, Route.NVME_CPU, 40),
    ],
)
def test_a_mode_gives_its_routes(settings: dict[str, object], route: Route, count: int) -> None:
    chosen = plan(OffloadConfig(**settings), MACHINE, JOB)
    assert chosen.placement.count(route) == count
    assert chosen.seconds > JOB.forward + JOB.backward


def test_auto_is_no_slower_than_any_mode_beyond_the_margin() -> None:
    auto = plan(OffloadConfig(mode="auto"), MACHINE, JOB).seconds
    for mode in ("cpu", "streamed", "twinflow", "deep_optimizer_states"):
        assert auto <= plan(OffloadConfig(mode=mode), MACHINE, JOB).seconds * 1.031


@pytest.mark.parametrize(
    ("settings", "machine", "message"),
    [
        ({"mode": "none"}, MACHINE, r"24\.00 GB of GPU memory per rank, 8\.00 GB are free"),
        ({"mode": "cpu"}, replace(MACHINE, host_free=20e9), r"GB of host memory per rank, 20\.00 GB are free"),
        ({"mode": "nvme", "nvme_paths": ["/x"]}, replace(MACHINE, nvme_read=0.0), "no NVMe path was profiled"),
        ({"mode": "nvme", "nvme_paths": ["/x"]}, replace(MACHINE, nvme_free=1e9), "of NVMe space per rank"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, object], machine: Machine, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(OffloadConfig(**settings), machine, JOB)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "cpu", "stride": 3}, "offload.stride is ignored by offload.mode=cpu"),
        ({"mode": "streamed", "resident_fraction": 0.5}, "belongs to twinflow"),
        ({"mode": "cpu", "nvme_paths": ["/x"]}, "belongs to auto and nvme"),
        ({"mode": "nvme"}, "needs offload.nvme_paths"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OffloadConfig(**settings)


def test_drift_needs_twenty_steps_in_a_row() -> None:
    drift = Drift(predicted=1.0)
    assert not any(drift.observe(1.09) for _ in range(100))
    assert not any(drift.observe(1.2) for _ in range(19))
    assert not drift.observe(1.0)
    assert [drift.observe(0.8) for _ in range(20)] == [False] * 19 + [True]


def test_a_replan_moves_only_what_changes() -> None:
    before = Placement((Route.CPU,) * 4)
    after = Placement((Route.CPU, Route.STREAMED, Route.CPU, Route.RESIDENT))
    assert moved(before, after) == [(1, Route.CPU, Route.STREAMED), (3, Route.CPU, Route.RESIDENT)]


def small_profile(monkeypatch: pytest.MonkeyPatch, paths: list[Path]) -> Profile:
    from rewarm.offload.runtime import profile

    monkeypatch.setattr(profile, "_SIZES", (1 << 16, 1 << 18))
    monkeypatch.setattr(profile, "_COPY_BYTES", 1 << 20)
    return measure(ThrottledDevice(h2d=2e9, d2h=1e9, duplex=2.5e9), threads=1, nvme_paths=paths, seconds=0.5)


def test_a_profile_is_measured_saved_and_read(disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rewarm.offload.runtime.nvme.measure", lambda path, seconds: (3e9, 2e9))
    measured = small_profile(monkeypatch, [disk])
    assert 0 < measured.h2d <= 2.1e9 and 0 < measured.d2h <= 1.05e9  # never faster than the link is set to
    machine = measured.machine(ranks=2, size=1 << 18)
    assert machine.nvme_read == 1.5e9 and machine.cpu_rate == measured.cpu_rates[str(1 << 18)]
    assert machine.dram == measured.dram / 2
    assert measured.machine(eight_bit=True).cpu_rate == measured.eight_bit_rates["cpu"] > 0
    path = tmp_path / "profile.json"
    measured.save(path)
    assert load(path, measured.fingerprint) == measured
    with pytest.raises(UserError, match="measured elsewhere"):
        load(path, "0" * 16)


def test_a_profile_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the profile"):
        load(tmp_path / "absent.json")
    (tmp_path / "torn.json").write_text('{"h2d": 1')
    with pytest.raises(UserError, match="no offload profile"):
        load(tmp_path / "torn.json")


def test_the_fingerprint_tells_threads_and_paths_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = ThrottledDevice(h2d=1e9)
    prints = {describe(device, 1)[0], describe(device, 2)[0], describe(device, 1, [tmp_path])[0]}
    assert len(prints) == 3 and describe(device, 1)[0] in prints
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path("abc") == tmp_path / "rewarm" / "offload" / "abc.json"


@pytest.mark.parametrize("forward", [1e-6, 0.1, 2.0])
def test_the_time_of_an_update_does_not_count_what_is_computed_beside_it(forward: float) -> None:
    job = replace(JOB, forward=forward, backward=2 * forward)
    timeline = predict(replace(MACHINE, device_free=40e9), job, Placement((Route.RESIDENT,) * 40))
    assert update_seconds(timeline) == pytest.approx(job.parameters / MACHINE.device_rate)

"""Placements against the relaxation's bound, against known systems and against arithmetic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rewarm.errors import UserError
from rewarm.offload.pipeline import predict
from rewarm.offload.placement import (
    NAMED,
    corners,
    fits,
    interleave,
    named,
    place,
    score,
    search,
    update_seconds,
)
from rewarm.offload.relaxation import relax
from rewarm.offload.routes import Job, Machine, Placement, Route, memory
from rewarm.offload.simulate import check

MACHINES = 200
SUBGROUPS = 96  # about what 5e9 parameters are in subgroups of the default size


def random_case(generator: np.random.Generator) -> tuple[Machine, Job]:
    """A rank of a plausible machine (PCIe 3 to 5, shared DRAM, half of them with NVMe) and a job on it."""

    def between(low: float, high: float) -> float:
        return float(np.exp(generator.uniform(np.log(low), np.log(high))))

    parameters = int(between(2e8, 8e9))
    link, dram = between(12e9, 63e9), between(20e9, 160e9)
    has_nvme = generator.random() < 0.5
    nvme = between(1e9, 16e9) if has_nvme else 0.0
    machine = Machine(
        h2d=link,
        d2h=link * generator.uniform(0.85, 1),
        duplex=link * generator.uniform(1.3, 1.8),
        dram=dram,
        cpu_rate=dram / 28 * generator.uniform(0.5, 1.1),
        device_rate=between(3e10, 12e10),
        device_free=generator.uniform(0.05, 0.9) * 12 * parameters,
        host_free=generator.uniform(0.3 if has_nvme else 1.05, 2.5) * 16 * parameters,
        device_free_backward=generator.choice([0.0, 0.2]) * 12 * parameters,
        nvme_read=nvme,
        nvme_write=0.7 * nvme,
        nvme_free=40.0 * parameters if has_nvme else 0.0,
    )
    forward = parameters * between(1e-11, 5e-10)
    job = Job(
        parameters,
        forward,
        2 * forward,
        micro_batches=int(generator.choice([1, 2, 4, 16])),
        grad_bytes=int(generator.choice([2, 4])),
    )
    return machine, job


def test_on_random_machines_no_known_system_is_faster_and_the_bound_is_near() -> None:
    generator = np.random.default_rng(7)
    gaps = []
    for number in range(MACHINES):
        machine, job = random_case(generator)
        job = replace(job, eight_bit=number % 4 == 3)
        best, bound = search(machine, job, SUBGROUPS)
        assert fits(machine, job, best.placement)
        check(predict(machine, job, best.placement), SUBGROUPS)
        known = [score(machine, job, placement).seconds for placement in corners(machine, job, SUBGROUPS)]
        assert best.seconds <= min(known, default=float("inf")) * (1 + 1e-9)
        gaps.append(best.seconds / bound.seconds - 1)
    assert min(gaps) >= -1e-6  # or the bound would be none
    assert np.mean(np.array(gaps) <= 0.05) >= 0.9


def test_the_bound_holds_for_random_placements() -> None:
    generator = np.random.default_rng(11)
    tried = 0
    for _ in range(200):
        machine, job = random_case(generator)
        job = replace(job, clip=bool(generator.random() < 0.5), eight_bit=bool(generator.random() < 0.5))
        routes = tuple(generator.choice(np.array(list(Route), dtype=object), 24, p=generator.dirichlet(np.ones(5))))
        placement = Placement(routes, split=job.can_split)
        if fits(machine, job, placement):
            tried += 1
            bound = relax(machine, job, 24, slots=3, host_slots=4, split=True)[0].seconds
            assert score(machine, job, placement).seconds >= bound * (1 - 1e-6)
    assert tried >= 20


# 4 H100: 55.2 GB/s each way and 2.2e9 parameters/s of CPU update per GPU are published for Deep Optimizer States. The
# node's DRAM is not; 500 GB/s is about 80% of two sockets of eight DDR5-4800 channels.
H100 = Machine(
    h2d=55.2e9,
    d2h=55.2e9,
    duplex=110.4e9,
    dram=125e9,
    cpu_rate=2.2e9,
    device_rate=30e9,
    device_free=3.7e9,
    host_free=1e12,
)
TWENTY_BILLION = Job(5_000_000_000, forward=0.21, backward=0.97)
PUBLISHED_UPDATE = 1.30


@pytest.mark.parametrize(("split", "share"), [(False, 0.90), (True, 0.75)], ids=["fp32", "split master"])
def test_twenty_billion_on_four_h100_update_faster_than_published(split: bool, share: float) -> None:
    best, _ = search(H100, TWENTY_BILLION, 50, split=split)
    assert update_seconds(H100, TWENTY_BILLION, best.placement) <= share * PUBLISHED_UPDATE


def test_interleaving_is_even_and_stride_two_is_a_case_of_it() -> None:
    routes = interleave({Route.CPU: 6, Route.STREAMED: 6})
    assert [route is Route.STREAMED for route in routes] == [i % 2 == 1 for i in range(12)]
    routes = interleave({Route.RESIDENT: 2, Route.CPU: 9, Route.STREAMED: 3})
    assert routes[:2] == (Route.RESIDENT,) * 2
    places = [i for i, route in enumerate(routes) if route is Route.STREAMED]
    assert set(np.diff(places)) == {4}


def test_named_systems_are_what_their_papers_say() -> None:
    for name in NAMED:
        assert len(named(H100, TWENTY_BILLION, 50, name).routes) == 50
    strided = named(H100, TWENTY_BILLION, 50, "deep_optimizer_states", stride=5)
    assert strided.count(Route.STREAMED) == 10 and strided.count(Route.CPU) == 40
    assert named(H100, TWENTY_BILLION, 50, "deep_optimizer_states", stride=1).count(Route.STREAMED) == 50
    kept = named(H100, TWENTY_BILLION, 50, "twinflow", resident=10)
    assert kept.routes[:10] == (Route.RESIDENT,) * 10 and kept.count(Route.CPU) == 40
    with pytest.raises(UserError, match="use one of"):
        named(H100, TWENTY_BILLION, 50, "zero_onload")


def test_what_fits_on_the_device_stays_there() -> None:
    machine = replace(H100, device_free=70e9)
    best, _ = place(machine, TWENTY_BILLION, 50)
    assert best.placement.count(Route.RESIDENT) == 50


def test_a_gain_below_three_percent_is_not_worth_moving_parts() -> None:
    long = replace(TWENTY_BILLION, micro_batches=400)
    best, _ = place(H100, long, 50)
    assert best.placement.count(Route.CPU) == 50
    assert search(H100, long, 50)[0].seconds < best.seconds < search(H100, long, 50)[0].seconds * 1.031
    assert place(H100, TWENTY_BILLION, 50)[0].placement.count(Route.STREAMED) > 0


def test_host_memory_decides_what_rests_on_nvme() -> None:
    machine = replace(H100, host_free=30e9, nvme_read=10e9, nvme_write=7e9, nvme_free=1e12)
    best, _ = place(machine, TWENTY_BILLION, 50)
    device, host, nvme = memory(best.placement, TWENTY_BILLION)
    assert device <= machine.device_free and host <= machine.host_free and nvme > 0


def test_state_that_fits_nowhere_is_refused_in_figures() -> None:
    with pytest.raises(UserError, match=r"(?s)60\.0 GB of optimizer state.*nvme_paths"):
        place(replace(H100, host_free=30e9), TWENTY_BILLION, 50)


def test_a_placement_survives_a_file() -> None:
    best, _ = place(H100, TWENTY_BILLION, 50)
    assert Placement.from_dict(best.placement.as_dict()) == best.placement

"""8-bit moments under every route: the bits of the kernel alone, one state for all placements, and real bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewarm.kernels import adamw
from rewarm.kernels.adamw import Moments8bit
from rewarm.kernels.blocks import QUANTIZED_BLOCK
from rewarm.offload.planning.placement import interleave
from rewarm.offload.planning.routes import Job, Placement, Route, costs
from rewarm.offload.runtime.device import ThrottledDevice
from rewarm.offload.runtime.execute import GroupStep
from rewarm.offload.runtime.optimizer import OffloadedAdamW, Resources, layout_of
from rewarm.offload.runtime.slabs import HostPool

# Shards of several blocks with a short last one, of less than one block, and of exactly one; two parameter groups.
SIZES = (9000, 70, 4097, 9, 2048, 2047)
GROUPS = (0, 1, 0, 1, 0, 1)
NAMES = [f"shard {i}" for i in range(len(SIZES))]


def settings(number: int) -> list[GroupStep]:
    rate = 1e-3 * min(1.0, number / 5)
    return [GroupStep(rate, weight_decay=0.1), GroupStep(rate / 2, beta2=0.99)]


def gradients(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(size, generator=generator) * 10.0 ** -(i % 3) for i, size in enumerate(SIZES)]


class Alone:
    """The kernel over each whole shard, with blocks of its own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.masters = [torch.randn(size, generator=generator) for size in SIZES]
        self.moments = [Moments8bit.zeros(size) for size in SIZES]

    def step(self, number: int, factor: float) -> None:
        for i, gradient in enumerate(gradients(number)):
            constants = settings(number)[GROUPS[i]].constants(number, factor)
            adamw.update_8bit(constants, self.masters[i], self.moments[i], gradient)


def placements(subgroups: int) -> list[Placement]:
    routes = (Route.RESIDENT, Route.STREAMED, Route.CPU, Route.NVME_CPU, Route.NVME_STREAMED)
    every = interleave({route: 2 if route is Route.CPU else 1 for route in routes})
    mixed = (every * (subgroups // len(every) + 1))[:subgroups]
    return [Placement((route,) * subgroups, slots=2, host_slots=2) for route in routes] + [Placement(mixed, slots=2)]


def adapter(shards: Sequence[Tensor], masters: Sequence[Tensor], place: int, size: int, disk: Path) -> OffloadedAdamW:
    subgroups = layout_of(NAMES, shards, GROUPS, size, eight_bit=True).subgroups
    return OffloadedAdamW(
        NAMES,
        shards,
        GROUPS,
        placements(subgroups)[place],
        Job(1, 0.0, 0.0, eight_bit=True),
        ThrottledDevice(),
        Resources(HostPool(pin=False), torch.float32, nvme_paths=[disk]),
        subgroup_size=size,
        masters=masters,
    )


def assert_same(offloaded: OffloadedAdamW, shards: Sequence[Tensor], alone: Alone) -> None:
    for i, (master, first, second) in enumerate(offloaded.state()):
        expected = (alone.masters[i], *alone.moments[i].values())
        for ours, theirs in zip((master, first, second), expected, strict=True):
            assert torch.equal(ours, theirs), NAMES[i]
        assert torch.equal(shards[i], alone.masters[i].to(shards[i].dtype))


@pytest.mark.parametrize("size", [2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_route_has_the_bits_of_the_kernel_alone_wherever_state_is_cut(
    dtype: torch.dtype, size: int, disk: Path
) -> None:
    """Moved from one placement to the next, and through what a checkpoint holds into a new one with another cut."""
    alone = Alone()
    shards = [master.to(dtype) for master in alone.masters]
    offloaded = adapter(shards, alone.masters, 0, size, disk)
    number = 0
    for placement in placements(offloaded.layout.subgroups):
        offloaded.place(placement)
        for _ in range(4):
            number += 1
            alone.step(number, 0.7)
            offloaded.step(number, gradients(number), settings(number), 0.7)
        assert_same(offloaded, shards, alone)
    state = offloaded.state()
    offloaded.close()
    fresh = [torch.zeros_like(shard) for shard in shards]
    offloaded = adapter(fresh, [torch.zeros(n) for n in SIZES], 5, 7000 - size, disk)
    offloaded.load(*zip(*state, strict=True))
    alone.step(number + 1, 0.5)
    offloaded.step(number + 1, gradients(number + 1), settings(number + 1), 0.5)
    assert_same(offloaded, fresh, alone)
    offloaded.close()


@pytest.mark.parametrize(("dtype", "master"), [(torch.float32, 0), (torch.bfloat16, 4)])
def test_state_on_the_device_takes_two_bytes_and_scales_beside_its_masters(
    dtype: torch.dtype, master: int, disk: Path
) -> None:
    alone = Alone()
    offloaded = adapter([each.to(dtype) for each in alone.masters], alone.masters, 0, 5000, disk)
    numel = offloaded.layout.numel
    assert numel % QUANTIZED_BLOCK == 0
    assert offloaded.states.device_bytes() == (master + 2) * numel + 8 * (numel // QUANTIZED_BLOCK)
    job = Job(numel, 0.0, 0.0, param_bytes=dtype.itemsize, eight_bit=True)
    assert costs(Route.RESIDENT, job, split=True).device_memory * numel == offloaded.states.device_bytes()
    offloaded.close()


@pytest.mark.parametrize("half", [True, False])
def test_what_routes_cost_counts_the_smaller_state(half: bool) -> None:
    """4 bytes of master, 2 of moments and two scales per block each way; there is nothing to split."""
    state = 4 + 2 + 8 / 2048
    job = Job(1000, 0.1, 0.1, grad_bytes=4, param_bytes=2 if half else 4, eight_bit=True)
    streamed = costs(Route.STREAMED, job, split=True)
    assert streamed.h2d == streamed.d2h_state == streamed.host_memory == state and streamed.dram == 2 * state
    assert costs(Route.CPU, job, split=True).host_memory == state + 4 + job.param_bytes
    assert costs(Route.NVME_CPU, job, split=True).nvme == state == job.state_bytes(split=True)

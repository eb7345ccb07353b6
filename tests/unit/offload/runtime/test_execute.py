"""Every route and mixture gives the bits of the update without offload, with real threads and a link that is slow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewarm.kernels import adamw
from rewarm.offload.planning.placement import interleave
from rewarm.offload.planning.routes import Job, Placement, Route
from rewarm.offload.planning.simulate import check
from rewarm.offload.runtime.device import ThrottledDevice
from rewarm.offload.runtime.execute import Executor, GroupStep
from rewarm.offload.runtime.slabs import HostPool, ParameterShard, StateLayout
from rewarm.offload.runtime.states import States

R, S, C, NC, NS = Route.RESIDENT, Route.STREAMED, Route.CPU, Route.NVME_CPU, Route.NVME_STREAMED
# Two parameter groups, a trailing subgroup, shards that cross subgroups, a tied weight that appears once.
LAYOUT = StateLayout.of(
    [
        ParameterShard("embedding", 5000),
        ParameterShard("norm", 70, group=1),
        ParameterShard("up", 3001),
        ParameterShard("bias", 9, group=1),
        ParameterShard("down", 4100),
    ],
    subgroup_size=1000,
)
COUNT = LAYOUT.subgroups
STEPS = 50


def mixture(**counts: int) -> tuple[Route, ...]:
    shares = {Route[name.upper()]: number for name, number in counts.items()}
    shares[Route.CPU] = shares.get(Route.CPU, 0) + COUNT - sum(shares.values())
    return interleave(shares)


PLACEMENTS = {
    "resident": (R,) * COUNT,
    "streamed, which is k = 1": (S,) * COUNT,
    "cpu": (C,) * COUNT,
    "nvme_cpu": (NC,) * COUNT,
    "nvme_streamed": (NS,) * COUNT,
    "every second one streamed": tuple(S if i % 2 else C for i in range(COUNT)),
    "twinflow": (R,) * 4 + (C,) * (COUNT - 4),
    "all five": mixture(resident=3, streamed=3, nvme_cpu=2, nvme_streamed=2),
}


def groups(step: int) -> list[GroupStep]:
    rate = 1e-3 * min(1.0, step / 10)
    return [GroupStep(rate, weight_decay=0.1), GroupStep(rate / 2, beta2=0.99)]


def scale(step: int) -> float:
    """An unscale factor with clipping in some steps."""
    return 0.25 if step % 3 else 0.25 * 0.61


class Plain:
    """The same kernel over the whole state, nothing offloaded."""

    def __init__(self, parameter_type: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(3)
        self.master = torch.randn(LAYOUT.numel, generator=generator)
        self.moments = torch.zeros(LAYOUT.numel), torch.zeros(LAYOUT.numel)
        self.parameters = self.master.to(parameter_type)

    def step(self, number: int, gradients: torch.Tensor, factor: float) -> None:
        constants = [
            adamw.AdamWStep.prepare(
                step=number,
                learning_rate=group.learning_rate,
                weight_decay=group.weight_decay,
                beta2=group.beta2,
                grad_scale=factor,
            )
            for group in groups(number)
        ]
        for shard, offset in zip(LAYOUT.shards, LAYOUT.offsets, strict=True):
            piece = slice(offset, offset + shard.numel)
            arrays = (self.master[piece], self.moments[0][piece], self.moments[1][piece], gradients[piece])
            adamw.update(constants[shard.group], *arrays)
        self.parameters = self.master.to(self.parameters.dtype)


def make_gradients(number: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    micro_batches = [torch.randn(LAYOUT.numel, generator=generator) for _ in range(2)]
    flat = torch.zeros(LAYOUT.numel)  # the gaps between shards have no gradient
    for i in range(len(LAYOUT.shards)):
        LAYOUT.view(flat, i).copy_(sum(LAYOUT.view(batch, i) for batch in micro_batches))
    return flat.to(dtype)


def open_executor(
    routes: tuple[Route, ...],
    parameters: torch.Tensor,
    gradients: torch.Tensor,
    folder: Path,
    *,
    split: bool = False,
    clip: bool = True,
    early: int = 0,
    rate: float = float("inf"),
) -> Executor:
    device = ThrottledDevice(h2d=rate, d2h=rate, duplex=1.5 * rate)
    placement = Placement(routes, slots=2, host_slots=2, split=split, early=early)
    states = States(
        LAYOUT,
        placement,
        device,
        parameter_type=parameters.dtype,
        gradient_type=gradients.dtype,
        pool=HostPool(pin=False),
        nvme_paths=[folder],
    )
    widths = {"grad_bytes": gradients.element_size(), "param_bytes": parameters.element_size()}
    job = Job(LAYOUT.numel, 0.0, 0.0, clip=clip, **widths)
    return Executor(LAYOUT, placement, job, device, states, parameters=parameters, gradients=gradients)


def assert_shards_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    kind = torch.int32 if ours.element_size() == 4 else torch.int16
    for i, shard in enumerate(LAYOUT.shards):
        assert torch.equal(LAYOUT.view(ours, i).view(kind), LAYOUT.view(theirs, i).view(kind)), shard.name


def assert_same(executor: Executor, plain: Plain) -> None:
    assert_shards_equal(executor.parameters, plain.parameters)
    for ours, theirs in zip(executor.states.export(executor.parameters), (plain.master, *plain.moments), strict=True):
        assert_shards_equal(ours, theirs)


@pytest.mark.parametrize("split", [False, True], ids=["fp32 master", "split master"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_fifty_steps_have_the_bits_of_the_plain_update(name: str, split: bool, disk: Path) -> None:
    plain = Plain(torch.bfloat16)
    parameters = torch.empty_like(plain.parameters)
    gradients = torch.zeros(LAYOUT.numel, dtype=torch.bfloat16)
    executor = open_executor(PLACEMENTS[name], parameters, gradients, disk, split=split)
    executor.states.load(plain.master, *plain.moments, parameters)
    for number in range(1, STEPS + 1):
        gradients.copy_(make_gradients(number, torch.bfloat16))
        timeline = executor.run_step(number, groups(number), scale(number))
        check(timeline, COUNT)
        plain.step(number, gradients, scale(number))
    assert_same(executor, plain)
    executor.close()
    executor.states.close()


@pytest.mark.parametrize("gradient_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameter_type", [torch.float32, torch.float16])
def test_other_widths(parameter_type: torch.dtype, gradient_type: torch.dtype, disk: Path) -> None:
    plain = Plain(parameter_type)
    parameters, gradients = torch.empty_like(plain.parameters), torch.zeros(LAYOUT.numel, dtype=gradient_type)
    executor = open_executor(PLACEMENTS["all five"], parameters, gradients, disk)
    executor.states.load(plain.master, *plain.moments, parameters)
    for number in range(1, 11):
        gradients.copy_(make_gradients(number, gradient_type))
        executor.run_step(number, groups(number), scale(number))
        plain.step(number, gradients, scale(number))
    assert_same(executor, plain)
    executor.close()
    executor.states.close()


@pytest.mark.parametrize("early", [0, 5, COUNT])
def test_without_clipping_updates_follow_the_gradients(early: int, disk: Path) -> None:
    plain = Plain(torch.bfloat16)
    parameters, gradients = torch.empty_like(plain.parameters), torch.zeros(LAYOUT.numel)
    routes = PLACEMENTS["all five"]
    executor = open_executor(routes, parameters, gradients, disk, clip=False, early=early, rate=40e6, split=True)
    executor.states.load(plain.master, *plain.moments, parameters)
    for number in range(1, 6):
        fresh = make_gradients(number, torch.float32)
        gradients.fill_(float("nan"))  # an update that does not wait for its gradient is found out
        executor.begin(number, groups(number))
        for subgroup in reversed(range(COUNT)):
            start, stop = LAYOUT.bounds(subgroup)
            gradients[start:stop] = fresh[start:stop]
            executor.gradient_ready(subgroup)
        executor.release()
        check(executor.finish(), COUNT)
        plain.step(number, fresh, 1.0)
    assert_same(executor, plain)
    executor.close()
    executor.states.close()


@pytest.mark.parametrize("name", ["all five", "streamed, which is k = 1", "every second one streamed"])
def test_a_slow_link_changes_nothing_and_parameters_are_waited_for(name: str, disk: Path) -> None:
    plain = Plain(torch.bfloat16)
    parameters, gradients = torch.empty_like(plain.parameters), torch.zeros(LAYOUT.numel)
    executor = open_executor(PLACEMENTS[name], parameters, gradients, disk, split=True, rate=20e6)
    executor.states.load(plain.master, *plain.moments, parameters)
    for number in range(1, 6):
        gradients.copy_(make_gradients(number, torch.float32))
        before = plain.parameters.clone()
        plain.step(number, gradients, scale(number))
        executor.begin(number, groups(number))
        for subgroup in reversed(range(COUNT)):
            executor.gradient_ready(subgroup)
        assert torch.equal(parameters[:5000], before[:5000])  # nothing moves before the norm is known
        executor.release(scale(number))
        for i in range(len(LAYOUT.shards)):  # the next forward pass, layer by layer
            for subgroup in LAYOUT.subgroups_of(i):
                executor.wait_parameters(subgroup)
            assert torch.equal(LAYOUT.view(parameters, i), LAYOUT.view(plain.parameters, i))
        check(executor.finish(), COUNT)
    assert_same(executor, plain)
    executor.close()
    executor.states.close()


@pytest.mark.parametrize("name", ["all five", "nvme_streamed"])
def test_a_step_that_is_abandoned_leaves_no_trace(name: str, disk: Path) -> None:
    plain = Plain(torch.bfloat16)
    parameters, gradients = torch.empty_like(plain.parameters), torch.zeros(LAYOUT.numel)
    executor = open_executor(PLACEMENTS[name], parameters, gradients, disk, split=True, rate=40e6)
    executor.states.load(plain.master, *plain.moments, parameters)
    for number, announced in enumerate((0, COUNT // 2, COUNT), start=1):
        gradients.fill_(float("nan"))
        executor.begin(number, groups(number))
        for subgroup in list(reversed(range(COUNT)))[:announced]:
            executor.gradient_ready(subgroup)
        executor.abandon()
        assert_same(executor, plain)
        gradients.copy_(make_gradients(number, torch.float32))
        plain.step(number, gradients, scale(number))
        check(executor.run_step(number, groups(number), scale(number)), COUNT)
        assert_same(executor, plain)
    executor.begin(4, groups(4))
    executor.close()  # ends what nobody will release
    assert_same(executor, plain)
    executor.states.close()


def test_another_placement_continues_from_the_exported_state(disk: Path) -> None:
    plain = Plain(torch.bfloat16)
    parameters, gradients = torch.empty_like(plain.parameters), torch.zeros(LAYOUT.numel, dtype=torch.bfloat16)
    state = (plain.master.clone(), *(moment.clone() for moment in plain.moments))
    number = 0
    for name, split in [("all five", True), ("cpu", False), ("nvme_streamed", True), ("resident", False)]:
        executor = open_executor(PLACEMENTS[name], parameters, gradients, disk, split=split)
        executor.states.load(*state, parameters)
        for _ in range(5):
            number += 1
            gradients.copy_(make_gradients(number, torch.bfloat16))
            executor.run_step(number, groups(number))
            plain.step(number, gradients, 1.0)
        state = executor.states.export(parameters)
        assert_same(executor, plain)
        executor.close()
        executor.states.close()


def test_an_error_in_a_stream_reaches_the_caller(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Plain(torch.bfloat16)
    parameters, gradients = torch.empty_like(plain.parameters), torch.zeros(LAYOUT.numel)
    executor = open_executor(PLACEMENTS["streamed, which is k = 1"], parameters, gradients, disk)
    executor.states.load(plain.master, *plain.moments, parameters)

    def broken(*arguments: object) -> None:
        raise OSError("the link is down")

    monkeypatch.setattr(executor.device, "copy", broken)
    with pytest.raises(OSError, match="the link is down"):
        executor.run_step(1, groups(1))
    with pytest.raises(AssertionError, match="not whole"):
        executor.begin(2, groups(2))
    executor.close()


def test_copies_never_convert() -> None:
    device = ThrottledDevice(h2d=1e9, d2h=1e9)
    with pytest.raises(AssertionError, match="would convert"):
        device.copy(torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16), "h2d")

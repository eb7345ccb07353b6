"""What only a GPU can show: CUDA kernels have the bits of the CPU's, and offloaded runs those of plain ones.

    python -m pytest -m gpu

Part of ``scripts/gpu.sh``. Without a GPU everything here is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewarm.kernels import adamw, native
from rewarm.offload.planning.routes import Job, Placement
from rewarm.offload.planning.simulate import check
from rewarm.offload.runtime.device import CudaDevice
from rewarm.offload.runtime.execute import Executor
from rewarm.offload.runtime.slabs import HostPool
from rewarm.offload.runtime.states import States
from unit.offload.runtime.test_execute import (
    COUNT,
    LAYOUT,
    PLACEMENTS,
    Plain,
    assert_same,
    groups,
    make_gradients,
    scale,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = (1, 63, 2048, 100_003, 3_000_000)
HALF, SINGLE = torch.bfloat16, torch.float32


def last_device() -> int:
    """Another one than torch's default, where there are several."""
    return torch.cuda.device_count() - 1


def random(size: int, seed: int, dtype: torch.dtype = SINGLE, scale: float = 1.0) -> torch.Tensor:
    """Numbers of all magnitudes, with zeros, infinities and a number that is none among them."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(size, generator=generator) * scale * 10 ** torch.randint(-12, 3, (size,), generator=generator)
    if size > 100:
        found[:4] = torch.tensor([0.0, float("inf"), -float("inf"), float("nan")])
    return found.to(dtype)


def assert_bits(there: torch.Tensor, here: torch.Tensor) -> None:
    """Equal in every bit; any NaN for any other."""
    back = there.cpu()
    kinds = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
    same = back.view(kinds[back.element_size()]) == here.view(kinds[here.element_size()])
    if here.dtype.is_floating_point:
        same |= back.isnan() & here.isnan()
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} differ, first at {int((~same).nonzero()[0])}"


def on_both(function: Callable[..., None], *tensors: torch.Tensor | None) -> None:
    """Call with tensors here and with copies there, and compare what became of them."""
    there = [None if tensor is None else tensor.to(torch.device("cuda", last_device())) for tensor in tensors]
    function(*tensors)
    function(*there)
    torch.cuda.synchronize(last_device())
    for ours, theirs in zip(there, tensors, strict=True):
        if ours is not None and theirs is not None:
            assert_bits(ours, theirs)


def step(number: int = 7) -> adamw.AdamWStep:
    return adamw.AdamWStep.prepare(step=number, learning_rate=3e-4, weight_decay=0.1, grad_scale=0.37)


def test_the_library_was_built() -> None:
    assert native.load() is not None
    assert native.load_cuda() is not None, native.why_no_cuda()


@pytest.mark.parametrize("out", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_update(size: int, grad: torch.dtype, out: torch.dtype | None) -> None:
    tensors = [random(size, 1), random(size, 2, scale=1e-3), random(size, 3).abs(), random(size, 4, grad)]
    target = None if out is None else torch.zeros(size, dtype=out)
    on_both(lambda *arrays: adamw.update(step(), *arrays), *tensors, target)


@pytest.mark.parametrize("size", SIZES)
def test_split_update_and_join(size: int) -> None:
    master, moment2 = random(size, 1), random(size, 3).abs()
    high, low = torch.zeros(size, dtype=HALF), torch.zeros(size, dtype=torch.int16)
    on_both(adamw.split, master, high, low, moment2)
    on_both(
        lambda *arrays: adamw.update_split(step(), *arrays), high, low, random(size, 2), moment2, random(size, 4, HALF)
    )
    on_both(adamw.join, high, low, moment2, master)


@pytest.mark.parametrize("size", SIZES)
def test_8bit_update(size: int) -> None:
    moments = adamw.Moments8bit.zeros(size)

    def update(master: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, *parts: torch.Tensor) -> None:
        for number in (1, 2, 3):
            adamw.update_8bit(step(number), master, adamw.Moments8bit(*parts), grad, out)

    parts = (moments.codes1, moments.codes2, moments.scales1, moments.scales2)
    grad = torch.randn(size, generator=torch.Generator().manual_seed(4)).to(HALF)
    on_both(update, torch.randn(size), grad, torch.zeros(size, dtype=HALF), *parts)


@pytest.mark.parametrize("size", SIZES)
def test_casts(size: int) -> None:
    for source in (torch.float32, torch.bfloat16, torch.float16):
        for target in (torch.float32, torch.bfloat16, torch.float16):
            on_both(adamw.cast, random(size, 5, source), torch.zeros(size, dtype=target))


@pytest.mark.parametrize("kind", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["fp32 master", "split master"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_route_has_the_bits_of_the_cpu(name: str, split: bool, kind: torch.dtype, disk: Path) -> None:
    """Streams, events and locked memory as they are in a run; gradients are made on the stream of this thread."""
    if split and kind == SINGLE:
        pytest.skip("only bf16 parameters are half of a master")
    plain, device = Plain(kind), CudaDevice(last_device())
    torch.cuda.set_device(last_device())
    parameters = torch.empty_like(plain.parameters, device=device.torch_device)
    gradients = torch.zeros(LAYOUT.numel, dtype=kind, device=device.torch_device)
    placement = Placement(PLACEMENTS[name], slots=2, host_slots=2, split=split)
    pool = HostPool(pin=True)
    widths = {"parameter_type": kind, "gradient_type": kind}
    states = States(LAYOUT, placement, device, pool=pool, nvme_paths=[disk], **widths)
    states.load(plain.master, *plain.moments, parameters)
    job = Job(LAYOUT.numel, 0.0, 0.0, grad_bytes=kind.itemsize, param_bytes=kind.itemsize)
    executor = Executor(LAYOUT, placement, job, device, states, parameters=parameters, gradients=gradients)
    for number in range(1, 11):
        made = make_gradients(number, kind)
        busy = torch.randn(2000, 2000, device=device.torch_device)
        for _ in range(20):
            busy = busy @ busy * 1e-3  # so that the gradient is late, and a wait that is missing shows
        gradients.copy_(made.to(device.torch_device) + busy.sum().mul(0).nan_to_num().to(kind))
        check(executor.run_step(number, groups(number), scale(number)), COUNT)
        plain.step(number, made, scale(number))
    on_host = type("OnHost", (), {"parameters": parameters.cpu(), "states": states})
    state = states.export(parameters)
    on_host.states = type("State", (), {"export": staticmethod(lambda _: state)})
    assert_same(on_host, plain)  # type: ignore[arg-type]
    executor.close()
    states.close()
    pool.close()


@pytest.mark.parametrize("mode", ["cpu", "streamed", "deep_optimizer_states", "twinflow"])
def test_an_engine_has_the_losses_of_the_plain_run(mode: str) -> None:
    from megatron.core import parallel_state

    from ranks.tiny import global_batch, tiny_engine

    def losses(offload: dict[str, Any]) -> list[float]:
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        engine = tiny_engine({"precision": "bfloat16", "offload": offload})
        engine.dry_run(global_batch(0))
        found = [engine.train_step(global_batch(step), 3e-3).loss for step in range(10)]
        engine.close()
        return found

    moved: dict[str, Any] = {"mode": mode, "subgroup_size": 8192}
    if mode == "twinflow":
        moved["resident_fraction"] = 0.4
    plain = losses({"mode": "none"})
    if losses({"mode": "none"}) != plain:
        pytest.skip("two plain runs differ on this GPU: its backward pass is not deterministic")
    assert losses(moved) == plain


def test_locked_memory_is_locked_and_given_back() -> None:
    pool = HostPool(pin=True)
    buffer = pool.take(5_000_000, torch.float32)
    assert buffer.is_pinned() and buffer[1000:2000].is_pinned()
    pool.close()
    assert not buffer.is_pinned()

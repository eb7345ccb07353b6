"""The reference update against fp64 arithmetic and torch, and its independence of cut, threads and instruction set."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.kernels import adamw, native

SETTINGS = {"learning_rate": 3e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
ISAS = {"portable": 0, "avx2": 1, "avx512": 2}


def make_state(elements: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(elements, generator=generator)
    moment1 = torch.randn(elements, generator=generator) * 1e-2
    moment2 = torch.rand(elements, generator=generator) * 1e-3
    return master, moment1, moment2


def make_grad(elements: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return (torch.randn(elements, generator=torch.Generator().manual_seed(seed)) * 0.1).to(dtype)


def bits(tensor: torch.Tensor) -> np.ndarray:
    kind = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.view(kind).numpy().copy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fifty_steps_stay_at_rounding_distance_of_double_precision(dtype: torch.dtype) -> None:
    elements, scale = 1003, 0.37
    master = make_state(elements)[0]
    moment1, moment2 = torch.zeros(elements), torch.zeros(elements)
    exact = torch.nn.Parameter(master.double())
    reference = torch.optim.AdamW([exact], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for number in range(1, 51):
        grad = make_grad(elements, dtype, seed=number)
        exact.grad = grad.double() * scale
        reference.step()
        step = adamw.AdamWStep.prepare(step=number, grad_scale=scale, **SETTINGS)
        adamw.update(step, master, moment1, moment2, grad)
    # Each step moves a weight by at most about the learning rate and rounds it a few times.
    tolerance = 50 * (2**-24 * exact.detach().abs() * 2 + 3e-3 * 2**-20)
    assert torch.all((master.double() - exact.detach()).abs() <= tolerance)
    state = reference.state[exact]
    torch.testing.assert_close(moment1.double(), state["exp_avg"], rtol=3e-6, atol=1e-8)
    torch.testing.assert_close(moment2.double(), state["exp_avg_sq"], rtol=3e-6, atol=1e-12)


def test_it_is_as_close_to_double_precision_as_torch() -> None:
    elements = 20_000
    master, moment1, moment2 = make_state(elements)[0], torch.zeros(elements), torch.zeros(elements)
    exact = torch.nn.Parameter(master.double())
    single = torch.nn.Parameter(master.clone())
    groups = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    rivals = [torch.optim.AdamW([exact], **groups), torch.optim.AdamW([single], fused=True, **groups)]
    for number in range(1, 31):
        grad = make_grad(elements, torch.float32, seed=number)
        exact.grad, single.grad = grad.double(), grad
        for rival in rivals:
            rival.step()
        adamw.update(adamw.AdamWStep.prepare(step=number, **SETTINGS), master, moment1, moment2, grad)
    ours = (master.double() - exact.detach()).abs().mean()
    theirs = (single.detach().double() - exact.detach()).abs().mean()
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_type", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_bits(
    isa: str, out_type: torch.dtype | None, grad_type: torch.dtype
) -> None:
    library = native.load()
    assert library is not None
    if library.rewarm_best_isa() < ISAS[isa]:
        pytest.skip(f"this CPU has no {isa}")
    elements = 4099
    step = adamw.AdamWStep.prepare(step=3, grad_scale=0.7, **SETTINGS)
    grad = make_grad(elements, grad_type)
    grad[:4] = torch.tensor([0.0, -0.0, 1e-7, 6e4]).to(grad_type)
    results = []
    for level in (ISAS[isa], -1):
        state = make_state(elements)
        out = None if out_type is None else torch.empty(elements + 3, dtype=out_type)[3:]  # off any cache line
        arguments = (ctypes.c_int64(elements), *(ctypes.c_void_p(x.data_ptr()) for x in (*state, grad)))
        target = None if out is None else ctypes.c_void_p(out.data_ptr())
        types = (adamw._TYPES[grad_type], target, 0 if out_type is None else adamw._TYPES[out_type])
        assert library.rewarm_adamw(*arguments, *types, ctypes.byref(step), 1, level) == 0
        results.append([bits(x) for x in (*state, *([] if out is None else [out]))])
    for ours, best in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, best)


@settings(max_examples=30, deadline=None)
@given(
    elements=st.integers(1, 70_000),
    cuts=st.lists(st.integers(0, 70_000), max_size=5),
    threads=st.integers(1, 4),
    start=st.integers(0, 9),
)
def test_no_cut_alignment_or_thread_count_changes_a_bit(
    elements: int, cuts: list[int], threads: int, start: int
) -> None:
    step = adamw.AdamWStep.prepare(step=7, grad_scale=1.25, **SETTINGS)
    grad = make_grad(elements, torch.bfloat16)
    whole, out = make_state(elements), torch.empty(elements, dtype=torch.bfloat16)
    adamw.update(step, *whole, grad, out, threads=1)
    padded = [torch.cat([torch.zeros(start), x]) for x in make_state(elements)]
    pieces_out = torch.empty(elements, dtype=torch.bfloat16)
    edges = sorted({0, elements, *(cut for cut in cuts if cut < elements)})
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        piece = [x[start + first : start + last] for x in padded]
        adamw.update(step, *piece, grad[first:last], pieces_out[first:last], threads=threads)
    for ours, theirs in zip(whole, padded, strict=True):
        assert torch.equal(ours, theirs[start:])
    assert torch.equal(out, pieces_out)


def test_large_arrays_with_streamed_copies_match_small_pieces() -> None:
    elements = (1 << 20) + 4097
    step = adamw.AdamWStep.prepare(step=2, **SETTINGS)
    grad = make_grad(elements, torch.bfloat16)
    whole, out = make_state(elements), torch.empty(elements + 1, dtype=torch.bfloat16)
    adamw.update(step, *whole, grad, out[1:])
    pieces = make_state(elements)
    for first in range(0, elements, 100_003):
        piece = slice(first, first + 100_003)
        adamw.update(step, *(x[piece] for x in pieces), grad[piece])
    for ours, theirs in zip(whole, pieces, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(out[1:], whole[0].bfloat16())


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_are_those_of_torch_for_every_kind_of_number(source: torch.dtype, target: torch.dtype) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    if source == torch.float32:
        low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
        values = ((halves.int()[:, None] << 16) | low).flatten().view(torch.float32)
    else:
        values = halves.view(source)
    result = torch.empty(values.numel(), dtype=target)
    adamw.cast(values, result)
    expected = values.to(target)
    finite = ~values.isnan()
    np.testing.assert_array_equal(bits(result[finite]), bits(expected[finite]))
    assert bool(result[~finite].isnan().all())


def all_bit_patterns_near_ties() -> torch.Tensor:
    """fp32 numbers of every high half and the low halves around a tie; NaNs left out."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234], dtype=np.uint32)
    words = ((np.arange(2**16, dtype=np.uint32) << 16)[:, None] | low).reshape(-1)
    values = words.view(np.float32)
    return torch.from_numpy(values[~np.isnan(values)])


def test_split_and_join_lose_nothing() -> None:
    master = all_bit_patterns_near_ties()
    moment2 = torch.rand(master.numel())
    before = moment2.clone()
    high = torch.empty(master.numel(), dtype=torch.bfloat16)
    low = torch.empty(master.numel(), dtype=torch.int16)
    adamw.split(master, high, low, moment2)
    np.testing.assert_array_equal(bits(high), bits(master.bfloat16()))
    back = torch.empty_like(master)
    adamw.join(high, low, moment2, back)
    np.testing.assert_array_equal(bits(back), bits(master))
    np.testing.assert_array_equal(bits(moment2), bits(before))


def test_a_nan_survives_the_split() -> None:
    master = torch.tensor([float("nan"), -float("nan"), float("inf"), 1.0])
    master.view(torch.int32)[0] = 0x7FFFFFFF
    moment2, high, low = torch.ones(4), torch.empty(4, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int16)
    adamw.split(master, high, low, moment2)
    back = torch.empty(4)
    adamw.join(high, low, moment2, back)
    assert bool(back[:2].isnan().all()) and torch.equal(back[2:], master[2:])


def test_updating_the_split_form_gives_the_bits_of_the_whole() -> None:
    elements = 70_001
    whole, parts = make_state(elements), make_state(elements)
    whole[0][:400] = parts[0][:400] = all_bit_patterns_near_ties()[200_000:200_400]
    high = torch.empty(elements, dtype=torch.bfloat16)
    low = torch.empty(elements, dtype=torch.int16)
    adamw.split(parts[0], high, low, parts[2])
    out = torch.empty(elements, dtype=torch.bfloat16)
    for number in range(1, 21):
        grad = make_grad(elements, torch.bfloat16, seed=number)
        step = adamw.AdamWStep.prepare(step=number, **SETTINGS)
        adamw.update(step, *whole, grad, out)
        adamw.update_split(step, high, low, parts[1], parts[2], grad)
    assert torch.equal(high, out)
    adamw.join(high, low, parts[2], parts[0])
    for ours, theirs in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [1, 17, 4096, 300_007])
def test_sum_of_squares(elements: int, dtype: torch.dtype) -> None:
    values = make_grad(elements, dtype)
    expected = float(values.double().square().sum())
    sums = {adamw.sum_squares(values, threads=threads) for threads in (1, 2, 3)}
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(expected, rel=1e-12)
    values[elements // 2] = float("inf")
    assert not np.isfinite(adamw.sum_squares(values))


def test_without_the_library_torch_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    elements = 5003
    step = adamw.AdamWStep.prepare(step=4, grad_scale=0.5, **SETTINGS)
    grad = make_grad(elements, torch.bfloat16)
    results = []
    for library in (native.load(), None):
        monkeypatch.setattr(native, "load", lambda library=library: library)
        state, out = make_state(elements), torch.empty(elements, dtype=torch.bfloat16)
        adamw.update(step, *state, grad, out)
        high, low = torch.empty_like(out), torch.empty(elements, dtype=torch.int16)
        adamw.split(state[0], high, low, state[2])
        back = torch.empty(elements)
        adamw.join(high, low, state[2], back)
        assert torch.equal(back, state[0]) and torch.equal(high, out)
        results.append(state)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_update_is_made_under_optimised_python() -> None:
    """``python -O`` leaves out every assert: the update must not be in one, nor what keeps it off foreign memory."""
    code = (
        "import torch; from rewarm.kernels import adamw\n"
        "step = adamw.AdamWStep.prepare(step=1, learning_rate=0.1)\n"
        "state = torch.ones(8), torch.zeros(8), torch.zeros(8)\n"
        "adamw.update(step, *state, torch.ones(8)); print(state[0].tolist() != [1.0] * 8)\n"
        "half = torch.zeros(8, dtype=torch.bfloat16)\n"
        "adamw.cast(torch.ones(8), half); print(half.tolist() == [1.0] * 8)\n"
        "try: adamw.update(step, *state, torch.ones(4))\n"
        "except AssertionError as error: print('is meant' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3, done.stdout + done.stderr

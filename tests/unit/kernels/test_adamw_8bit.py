"""8-bit moments: the code against one written from the paper, error bounds, bits that do not depend on who computes."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.kernels import adamw, native
from rewarm.kernels.adamw import AdamWStep, Moments8bit
from rewarm.kernels.blocks import QUANTIZED_BLOCK


def codebook(bits: int) -> np.ndarray:
    """Values of the codes 1 to 2^bits - 1: k leading zeros are a decade, the rest the middle of a cell in it; over the
    largest of them."""
    values = []
    for code in range(1, 2**bits):
        text = f"{code:0{bits}b}"
        zeros = text.index("1")
        fraction = text[zeros + 1 :]
        cell = int(fraction, 2) if fraction else 0
        values.append(10.0**-zeros * (0.1 + 0.9 * (cell + 0.5) / 2 ** len(fraction)))
    return np.array(values) / max(values)


def constants(number: int, **changes: float) -> AdamWStep:
    return AdamWStep.prepare(step=number, **{"learning_rate": 1e-3, **changes})


def one_step_from_zero(grad: torch.Tensor) -> Moments8bit:
    """After one step from zero, the moments are 0.1 g and 0.05 g^2 before they are quantised."""
    moments = Moments8bit.zeros(grad.numel())
    adamw.update_8bit(constants(1), torch.zeros(grad.numel()), moments, grad)
    return moments


def test_the_codes_are_those_of_dynamic_quantisation() -> None:
    library = native.load()
    assert library is not None
    signed, unsigned = np.zeros(256, np.float32), np.zeros(256, np.float32)
    library.rewarm_codebooks(*(ctypes.c_void_p(table.ctypes.data) for table in (signed, unsigned)))
    np.testing.assert_allclose(unsigned[1:], codebook(8), rtol=1e-7)
    np.testing.assert_allclose(signed[1:128], codebook(7), rtol=1e-7)
    np.testing.assert_array_equal(signed[129:], -signed[1:128])
    assert signed[0] == unsigned[0] == 0


def test_each_moment_becomes_the_middle_of_its_cell() -> None:
    generator = torch.Generator().manual_seed(1)
    magnitude = 10.0 ** (-9 * torch.rand(3 * QUANTIZED_BLOCK + 777, generator=generator))
    grad = magnitude * torch.randn(magnitude.shape, generator=generator).sign()
    first, second = (x.double().numpy() for x in one_step_from_zero(grad).values())
    g = grad.double().numpy()
    exact1, exact2 = np.float64(np.float32(0.1)) * g, np.float64(np.float32(0.05)) * g * g
    for start in range(0, len(g), QUANTIZED_BLOCK):
        block = slice(start, start + QUANTIZED_BLOCK)
        for exact, found, bits in ((exact1[block], first[block], 7), (exact2[block], second[block], 8)):
            values = codebook(bits)
            scale = np.abs(exact).max()
            zero = [] if bits == 8 else [0.0]
            choices = np.concatenate([values, zero]) * scale
            error = np.abs(found - exact)
            top = 0.1 + 0.9 * (2 ** (bits - 1) - 0.5) / 2 ** (bits - 1)  # the middle of the last cell
            scale /= top
            decade = np.clip(np.floor(-np.log10(np.abs(exact) / scale)), 0, bits - 1)
            half_cell = 0.45 * 10.0**-decade / 2 ** (bits - 1 - decade)
            # Below the last decade a first moment becomes zero and a second one the least code.
            below = np.abs(exact) < 10.0**-bits * scale
            assert np.all(error[~below] <= half_cell[~below] * scale * (1 + 1e-5))
            np.testing.assert_allclose(np.abs(found[below]), choices.min(), rtol=1e-6)
            assert np.all(error <= 0.45 / 2 ** (bits - 1) * scale * (1 + 1e-5))


@given(seed=st.integers(0, 2**32), numel=st.integers(1, 3 * QUANTIZED_BLOCK), spread=st.floats(0, 36))
@settings(max_examples=60, deadline=None)
def test_what_was_quantised_once_is_quantised_without_loss(seed: int, numel: int, spread: float) -> None:
    """So a checkpoint in fp32 holds 8-bit moments exactly, down to scales whose least values are subnormal."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(numel, generator=generator) * 10 ** (-spread * torch.rand(1, generator=generator))
                     for _ in range(2))  # fmt: skip
    once = Moments8bit.of(first, second.square())
    again = Moments8bit.of(*once.values())
    for ours, theirs in zip(once.arrays(), again.arrays(), strict=True):
        assert torch.equal(ours, theirs)
    for block, scale in enumerate(once.scales1.tolist()):
        inside = slice(block * QUANTIZED_BLOCK, (block + 1) * QUANTIZED_BLOCK)
        assert float(once.values()[0][inside].abs().max()) == scale == float(first[inside].abs().max())


def test_a_second_moment_never_becomes_zero_beside_a_large_one() -> None:
    grad = torch.full((QUANTIZED_BLOCK,), 1e-9)
    grad[0] = 1.0
    moments = one_step_from_zero(grad)
    assert bool((moments.values()[1] > 0).all())
    master = torch.zeros(QUANTIZED_BLOCK)
    adamw.update_8bit(constants(2), master, moments, grad)
    assert float(master.abs().max()) < 2e-3  # no step is larger than the learning rate allows


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("left", [0.0, 1e-6])
def test_a_parameter_without_gradients_comes_to_rest(beta2: float, left: float) -> None:
    """Rows of tokens that do not occur lie in one block with others. Their first moment is less than a cell above what
    it should be in the next step: rounded back it would move them for ever."""
    idle = torch.arange(QUANTIZED_BLOCK) % 2 == 0
    generator = torch.Generator().manual_seed(5)
    master, moments = torch.zeros(QUANTIZED_BLOCK), Moments8bit.zeros(QUANTIZED_BLOCK)
    exact = torch.zeros(QUANTIZED_BLOCK), torch.zeros(QUANTIZED_BLOCK), torch.zeros(QUANTIZED_BLOCK)
    for number in range(1, 501):
        grad = torch.randn(QUANTIZED_BLOCK, generator=generator)
        grad[idle] *= 1.0 if number == 1 else left
        adamw.update_8bit(constants(number, beta2=beta2), master, moments, grad)
        adamw.update(constants(number, beta2=beta2), *exact, grad * ~idle if number > 1 else grad)
    # In fp32 what is left of the first step goes on for a dozen more, each smaller than the one before.
    assert float(master[idle].abs().max()) < 1.25 * float(exact[0][idle].abs().max())
    again = Moments8bit.of(*moments.values())
    assert all(map(torch.equal, moments.arrays(), again.arrays()))


@pytest.mark.parametrize("isa", [0, 1])
@pytest.mark.parametrize(("grad_type", "out_type"), [(1, 0), (2, 2), (3, 3)])
def test_instruction_sets_threads_and_cuts_give_the_same_bits(isa: int, grad_type: int, out_type: int) -> None:
    library = native.load()
    assert library is not None
    elements = 40 * QUANTIZED_BLOCK + 1001
    kind = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
    results = []
    for level, threads, cuts in ((-1, 1, [0, elements]), (isa, 3, [0, 7 * QUANTIZED_BLOCK, elements])):
        master = torch.randn(elements, generator=torch.Generator().manual_seed(2))
        moments, out = Moments8bit.zeros(elements), torch.zeros(elements, dtype=kind[max(out_type, 2)])
        for number in range(1, 5):
            grad = torch.randn(elements, generator=torch.Generator().manual_seed(number)).to(kind[grad_type])
            grad[::3] *= number == 1  # what is left of their first moment is let go of
            for first, last in zip(cuts[:-1], cuts[1:], strict=True):
                blocks = slice(first // QUANTIZED_BLOCK, None)
                arrays = (master[first:], moments.codes1[first:], moments.codes2[first:])
                arrays += (moments.scales1[blocks], moments.scales2[blocks], grad[first:])
                pointers = [ctypes.c_void_p(x.data_ptr()) for x in arrays]
                target = ctypes.c_void_p(out[first:].data_ptr()) if out_type else None
                step = ctypes.byref(constants(number, grad_scale=0.7, weight_decay=0.1))
                arguments = (ctypes.c_int64(last - first), *pointers, grad_type, target, out_type, step)
                assert library.rewarm_adamw_8bit(*arguments, threads, level) == 0
        results.append((master, moments.codes1, moments.codes2, moments.scales1, moments.scales2, out))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    if out_type:
        assert torch.equal(results[0][5], results[0][0].to(kind[out_type]))


def test_what_is_not_finite_shows() -> None:
    grad = torch.ones(2 * QUANTIZED_BLOCK)
    for value in (float("nan"), float("inf")):
        grad[5] = value
        first, second = one_step_from_zero(grad).values()
        assert bool(first[:QUANTIZED_BLOCK].isnan().all()) and bool(second[:QUANTIZED_BLOCK].isnan().all())
        assert bool(first[QUANTIZED_BLOCK:].isfinite().all())


def test_training_stays_beside_the_fp32_run() -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(512, 64, generator=generator)
    wanted = torch.tanh(inputs @ torch.randn(64, 64, generator=generator) / 8) + 0.1 * torch.randn(
        512, 64, generator=generator
    )
    weights = [torch.zeros(64 * 64), torch.zeros(64 * 64)]
    moments8, moments32 = Moments8bit.zeros(64 * 64), (torch.zeros(64 * 64), torch.zeros(64 * 64))
    losses: list[list[float]] = [[], []]
    for number in range(1, 301):
        rows = torch.randint(0, 512, (64,), generator=generator)
        step = constants(number, learning_rate=2e-3)
        grads = []
        for which, flat in enumerate(weights):
            weight = flat.view(64, 64).clone().requires_grad_()
            loss = (torch.tanh(inputs[rows] @ weight) - wanted[rows]).square().mean()
            loss.backward()
            losses[which].append(loss.item())
            assert weight.grad is not None
            grads.append(weight.grad.flatten())
        adamw.update_8bit(step, weights[0], moments8, grads[0])
        adamw.update(step, weights[1], *moments32, grads[1])
    ends = [sum(each[-30:]) / 30 for each in losses]
    assert ends[1] < 0.3 * losses[1][0]  # it learns
    assert ends[0] == pytest.approx(ends[1], rel=0.02)
    apart = (weights[0] - weights[1]).norm() / weights[1].norm()
    assert 0 < float(apart) < 0.05

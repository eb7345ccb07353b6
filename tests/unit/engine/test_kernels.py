"""Our own operators against torch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rewarm.engine.megatron import loss
from rewarm.engine.megatron.activation import SwiGLU
from rewarm.engine.megatron.loss import _CrossEntropy
from rewarm.engine.megatron.norm import rms_norm
from rewarm.engine.megatron.rotary import _Rotate


def _gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    return torch.autograd.grad((output * weights).sum(), inputs)


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype).requires_grad_()


def test_rms_norm() -> None:
    hidden, weight = _random(3, 5, 16, dtype=torch.float32), _random(16, dtype=torch.float32)
    ours, theirs = rms_norm(hidden, weight, 1e-5), functional.rms_norm(hidden, (16,), weight, 1e-5)
    torch.testing.assert_close(ours, theirs)
    for found, expected in zip(_gradients(ours, hidden, weight), _gradients(theirs, hidden, weight), strict=True):
        torch.testing.assert_close(found, expected)


def test_rms_norm_of_zeros_is_zero() -> None:
    hidden = torch.zeros(2, 8, requires_grad=True)
    output = rms_norm(hidden, torch.ones(8), 1e-5)
    (gradient,) = torch.autograd.grad(output.sum(), hidden)
    assert output.abs().max() == 0
    assert gradient.isfinite().all()


def test_rms_norm_in_bfloat16_rounds_as_hugging_face_does() -> None:
    hidden, weight = _random(7, 32, dtype=torch.bfloat16), _random(32, dtype=torch.bfloat16)
    wide = hidden.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)
    torch.testing.assert_close(rms_norm(hidden, weight, 1e-6), expected, rtol=1e-2, atol=0)
    assert all(gradient.dtype == torch.bfloat16 for gradient in _gradients(rms_norm(hidden, weight, 1e-6), hidden))


def test_swiglu() -> None:
    projected = _random(4, 3, 20)
    gate, up = projected.chunk(2, dim=-1)
    ours, theirs = SwiGLU(None)(projected), functional.silu(gate) * up
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(_gradients(ours, projected), _gradients(theirs, projected))


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    positions, dim = 6, 8
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), torch.rand(dim // 2, dtype=torch.float64))
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    vector = torch.randn(1, 1, 1, dim, dtype=torch.float64).expand(positions, 1, 1, dim)
    turned = _Rotate.apply(vector, cos, sin).flatten(1)
    products = turned @ turned.t()
    for distance in range(positions):
        torch.testing.assert_close(products.diagonal(distance), products[0, distance].expand(positions - distance))
    torch.testing.assert_close(turned.norm(dim=1), vector.flatten(1).norm(dim=1))


def test_rotation_gradient() -> None:
    angles = torch.rand(3, 1, 1, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _Rotate.apply(x, angles.cos(), angles.sin()), (_random(3, 2, 2, 8),))


def test_cross_entropy_in_place() -> None:
    targets = torch.tensor([0, 6, 3, 3, 2])
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-3)):
        logits = (_random(5, 7, dtype=torch.float32) * 4).detach().to(dtype).requires_grad_()
        theirs = functional.cross_entropy(logits.float(), targets, reduction="none")
        expected = _gradients(theirs, logits)
        ours = _CrossEntropy.apply(logits * 1, targets)  # a copy: it is overwritten
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
        torch.testing.assert_close(_gradients(ours, logits), expected, rtol=0, atol=tolerance)


def test_cross_entropy_of_parts_has_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = 37, 1003
    targets = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(3))
    logits = (_random(rows, columns, dtype=torch.float32) * 4).detach().to(torch.bfloat16).requires_grad_()
    weights = torch.linspace(0.5, 2, rows)
    scores = torch.log_softmax(logits.detach().float(), -1)
    expected = scores.exp().scatter_add_(-1, targets[:, None], torch.full((rows, 1), -1.0)) * weights[:, None]
    for block in (1, 5 * columns, 1 << 24):
        monkeypatch.setattr(loss, "_BLOCK", block)
        losses = _CrossEntropy.apply(logits * 1, targets)
        assert torch.equal(losses, -scores.gather(-1, targets[:, None]).squeeze(-1))
        (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
        assert torch.equal(gradient, expected.to(torch.bfloat16))


def test_cross_entropy_leaves_minus_infinity_out() -> None:
    logits = _random(4, 6, dtype=torch.float32)
    mask = torch.tensor([0.0, 0, 0, 0, float("-inf"), float("-inf")])
    targets = torch.tensor([1, 0, 3, 2])
    losses = _CrossEntropy.apply(logits + mask, targets)
    torch.testing.assert_close(losses, functional.cross_entropy(logits[:, :4], targets, reduction="none"))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient[:, 4:].abs().max() == 0
    assert gradient.isfinite().all()

"""Rotary positions (Su et al., 2021, arXiv:2104.09864) with Hugging Face's frequencies and channel order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewarm.model.architecture import Architecture
from rewarm.model.rope import inverse_frequencies


class _Rotate(torch.autograd.Function):
    """Turns each pair (channel i, channel i + dim/2) by its angle; the gradient turns back by the same angle.

    Three passes over memory and nothing kept for the backward pass but the two tables.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return turned


class Rotary:
    """Turns queries and keys by their positions, from tables that are built once per length, device and dtype."""

    def __init__(self, architecture: Architecture) -> None:
        self._frequencies = inverse_frequencies(architecture)
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Args: x [S, B, heads, head_dim], the whole sequence. Returns: the same shape, contiguous."""
        key = (x.shape[0], x.device, x.dtype)
        if key not in self._tables:
            self._tables[key] = self._build(*key)
        return _Rotate.apply(x, *self._tables[key])

    def _build(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self._frequencies)[:, None, None, :]
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)

"""Micro-batches through Megatron-Core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from rewarm.engine import device


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass. All tensors lie on the rank's device."""

    inputs: Tensor
    """int64 [B, S]."""
    labels: Tensor | None
    """int64 [B, S]; None asks for logits."""
    mask: Tensor | None
    """bool [B, S], or None for every target."""
    weights: Tensor | None = None
    """float64 [B], factors of the windows in the objective, or None for 1."""


def split(
    tokens: np.ndarray, mask: np.ndarray | None, micro_batch_size: int, weights: np.ndarray | None = None
) -> list[MicroBatch]:
    """Cut windows [B, S + 1] into micro-batches; B is a multiple of ``micro_batch_size``."""
    place = device.local_device()
    windows = torch.from_numpy(tokens).to(place)
    inputs, labels = windows[:, :-1].split(micro_batch_size), windows[:, 1:].split(micro_batch_size)
    masks, factors = (
        [None] * len(inputs) if values is None else torch.from_numpy(values).to(place).split(micro_batch_size)
        for values in (mask, weights)
    )
    return [MicroBatch(*parts) for parts in zip(inputs, labels, masks, factors, strict=True)]


def _forward_step(
    finish: Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, Any]], batches: Iterator[MicroBatch], chunk: nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]:
    batch = next(batches)
    return chunk(batch.inputs, None, None, labels=batch.labels), partial(finish, batch)


def _no_tokens(place: torch.device) -> Tensor:
    # The schedule adds up token counts in order to scale gradients; the loss is scaled already.
    return torch.zeros((), dtype=torch.int, device=place)


def _run(
    chunks: Sequence[nn.Module],
    batches: Sequence[MicroBatch],
    finish: Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, Any]],
    *,
    forward_only: bool,
) -> list[Any]:
    size, length = batches[0].inputs.shape
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, finish),
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=size,
        forward_only=forward_only,
    )


def window_losses(losses: Tensor, mask: Tensor | None) -> Tensor:
    """Sums of token losses per window. Args: losses [B, S], mask [B, S] or None. Returns: float64 [B]."""
    return (losses if mask is None else losses * mask).sum(dim=1, dtype=torch.float64)


def train(chunks: Sequence[nn.Module], batches: Sequence[MicroBatch], num_tokens: int) -> list[Tensor]:
    """Forward and backward; gradients are of the weighted loss sum divided by ``num_tokens``. Collective.

    Returns:
        Loss sums of the windows of each micro-batch, float64 [B], unweighted; empty unless on the last pipeline stage.
    """

    def finish(batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums = window_losses(losses, batch.mask)
        weighted = sums if batch.weights is None else sums * batch.weights
        return weighted.sum() / num_tokens, _no_tokens(losses.device), sums.detach()

    return _run(chunks, batches, finish, forward_only=False)


def forward(chunks: Sequence[nn.Module], batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Forward only. Collective over one pipeline.

    Returns:
        Per micro-batch its token losses, fp32 [B, S], or logits [B, S, V / tensor] where it has no labels; empty
        unless on the last pipeline stage.
    """

    def finish(batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return output, _no_tokens(output.device), output

    with torch.no_grad():
        return _run(chunks, batches, finish, forward_only=True)

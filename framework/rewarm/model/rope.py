"""Rotary frequencies, for engines whose own rotary embedding does not know every kind of scaling honoured here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rewarm.model.architecture import Architecture

if TYPE_CHECKING:
    import torch

SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of ``rope_scaling`` that are honoured, with the numbers each needs."""


def inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """Angle in radians by which each pair of a head's dimensions turns from one position to the next.

    Plain: theta ** (-2i / head_dim) (Su et al. 2021). ``linear`` divides all of them by ``factor`` (Chen et al. 2023,
    position interpolation). ``llama3`` divides those whose wavelength exceeds the old context and interpolates up to
    the short ones, which stay (Llama 3.1 model code, ``apply_scaling``).

    Returns:
        float32 [head_dim / 2], on the CPU.
    """
    import torch

    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).float() / architecture.head_dim
    plain = 1.0 / (architecture.rope_theta**exponents)
    scaling = architecture.rope_scaling
    if scaling is None:
        return plain
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return plain / factor
    assert scaling["rope_type"] == "llama3", scaling
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * plain / factor + kept * plain

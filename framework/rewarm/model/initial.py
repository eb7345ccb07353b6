"""The random weights that a model without parent starts from, the same for every engine and layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_RESIDUAL = ("o_proj.weight", "down_proj.weight")
"""What writes to the residual stream."""


class RandomTensors:
    """Tensors that depend on the seed and their Hugging Face name alone.

    Matrices are normal with ``initializer_range``; those that write to the residual stream are scaled by
    1/sqrt(2 * num_layers) (Radford et al., 2019); norms are one and biases zero.

    Args:
        shapes: of every tensor of the model.
        seed: of the run.
        initializer_range: standard deviation.
        num_layers: of the model.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], *, seed: int, initializer_range: float, num_layers: int
    ) -> None:
        self._shapes, self._seed = shapes, seed
        self._scale, self._residual_scale = initializer_range, initializer_range / math.sqrt(2 * num_layers)

    def draw(self, name: str) -> torch.Tensor:
        """One whole tensor, fp32 on the CPU."""
        import torch

        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        scale = self._residual_scale if name.endswith(_RESIDUAL) else self._scale
        return torch.empty(shape).normal_(0.0, scale, generator=generator)

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        """A block of one tensor, as :meth:`rewarm.model.safetensors_io.TensorFolder.read` gives it."""
        tensor = self.draw(name)[rows]
        return tensor if columns is None else tensor[:, columns]

"""A model whose optimizer state does not fit beside its activations on this machine (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass

STATE_BYTES = 12
"""fp32 master and two moments, per parameter."""
BESIDE_BYTES = 6
"""bf16 parameter and fp32 gradient, per parameter, which stay on the GPU."""
HOST_BYTES = 20
"""What the hungriest contestant takes of host memory per parameter: state, fp32 gradient, bf16 copies."""
CONTEXT = 1.5e9
"""CUDA context and libraries."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-style decoder and its window."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int = 32000
    sequence_length: int = 2048

    @property
    def parameters(self) -> int:
        """With an output layer of its own."""
        layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def activation_bytes(self) -> float:
        """Of one window in bf16 without recomputation, about: 14 hidden and 4 FFN rows a layer, and the fp32 logits,
        their softmax and its gradient."""
        layer = 2 * self.sequence_length * (14 * self.hidden_size + 4 * self.ffn_hidden_size)
        return float(self.num_layers * layer + 3 * 4 * self.sequence_length * self.vocab_size)


SHAPES = (
    Shape(16, 1024, 2816, 16),
    Shape(24, 2048, 5504, 16),
    Shape(32, 2560, 6912, 20),
    Shape(32, 4096, 11008, 32),
    Shape(40, 5120, 13824, 40),
)
"""About 0.3, 1.3, 2.8, 6.7 and 13 billion parameters."""
TINY = Shape(2, 128, 352, 2, 512, 64)
"""For a machine without a GPU, where only the benchmark itself is tried."""


def choose(gpu: float, host: float) -> Shape:
    """The largest shape that trains here with its state elsewhere.

    Args:
        gpu: bytes of GPU memory.
        host: bytes of host memory that may be taken.
    """
    fitting = [
        shape
        for shape in SHAPES
        if shape.parameters * HOST_BYTES < 0.7 * host and room_beside(shape) + 0.2 * state(shape) < 0.9 * gpu
    ]
    return fitting[-1] if fitting else SHAPES[0]


def state(shape: Shape) -> float:
    """Bytes of optimizer state."""
    return float(STATE_BYTES * shape.parameters)


def room_beside(shape: Shape) -> float:
    """Bytes of GPU memory that training takes without any state."""
    return BESIDE_BYTES * shape.parameters + shape.activation_bytes + CONTEXT


def cap(shape: Shape, gpu: float) -> float:
    """Bytes of GPU memory to train with: all of it, or less where the state would fit beside the activations.

    Under a cap 40% of the state, or the 3 GB that buffers need, would still fit.
    """
    wanted = room_beside(shape) + max(0.4 * state(shape), 3e9)
    return min(gpu, wanted)

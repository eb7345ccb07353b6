"""The interface of an update rule, the same under both engines. No torch at import: the configuration reads it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from rewarm.config.training import OptimizerConfig


class UpdateRule(ABC):
    """How fp32 parameters move by their gradients.

    A rule sees parameters in pieces, as the engine divides them among ranks, and so must be elementwise. It keeps up to
    two buffers of a parameter's shape; engines create, shard and save both.

    Args:
        settings: the section ``optimizer``; the rule's own settings are its ``settings``.
    """

    uses: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "epsilon")
    """The common settings that it follows besides weight_decay and gradient_clipping; the others are refused."""
    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    """The buffers that it fills, of these two. A stage keeps the parent's only if both rules fill the same."""
    eight_bit: ClassVar[bool] = False
    """True if the buffers have one byte per element."""
    can_be_offloaded: ClassVar[bool] = False
    """True if ``offload`` knows how to run it on the CPU and in pieces: it has the arithmetic of
    :mod:`rewarm.kernels.adamw`."""

    def __init__(self, settings: OptimizerConfig) -> None:
        self.settings = settings

    @abstractmethod
    def update(
        self,
        group: Mapping[str, Any],
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        grad_scale: float,
    ) -> None:
        """Make one update in place.

        Args:
            group: ``lr``, ``betas``, ``eps``, ``weight_decay`` (0 for norms and biases) and ``step``, the number of
                this update from 1.
            parameters: fp32, on one device.
            gradients: fp32, of the parameters' shapes; may be overwritten.
            states: ``exp_avg`` and ``exp_avg_sq`` of each parameter, of its shape; zeros before the first update.
            grad_scale: what every gradient is multiplied by first, for clipping.
        """

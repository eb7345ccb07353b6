"""Plain gradient descent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rewarm.config.registry import OPTIMIZERS
from rewarm.optimizers.base import UpdateRule

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("sgd")
class SGD(UpdateRule):
    """Plain gradient descent with decoupled weight decay and no momentum, mainly to check gradients: Adam hides their
    scale."""

    uses = ()
    moments = ()

    def update(
        self,
        group: Mapping[str, Any],
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        grad_scale: float,
    ) -> None:
        """``p <- (1 - lr * weight_decay) * p - lr * grad_scale * g``."""
        import torch

        if grad_scale != 1:
            torch._foreach_mul_(list(gradients), grad_scale)
        torch._foreach_mul_(list(parameters), 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(list(parameters), list(gradients), alpha=-group["lr"])

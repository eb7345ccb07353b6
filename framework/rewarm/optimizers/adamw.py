"""AdamW, with the project's kernel where it runs and torch's elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rewarm.config.registry import OPTIMIZERS
from rewarm.optimizers.base import UpdateRule

if TYPE_CHECKING:
    from torch import Tensor


@OPTIMIZERS.register("adamw")
class AdamW(UpdateRule):
    """Adam with decoupled weight decay and fp32 state (Loshchilov and Hutter 2019, arXiv:1711.05101).

    The arithmetic is that of :mod:`rewarm.kernels.adamw`, so that a run has the same bits with its state offloaded and
    without; on a GPU without the compiled kernel it is torch's.
    """

    can_be_offloaded = True

    def update(
        self,
        group: Mapping[str, Any],
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        grad_scale: float,
    ) -> None:
        """``m``, ``v`` and the bias corrections as in the paper; the gradient is scaled first."""
        import torch

        from rewarm.kernels import adamw

        if adamw.runs_on(parameters[0].device):
            constants = adamw.AdamWStep.of_group(group, grad_scale)
            for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
                flat = (each.detach().view(-1) for each in (parameter, state["exp_avg"], state["exp_avg_sq"], gradient))
                adamw.update(constants, *flat)
            return
        if grad_scale != 1:
            torch._foreach_mul_(list(gradients), grad_scale)
        step = torch.tensor(float(group["step"]), device=parameters[0].device)
        torch._fused_adamw_(
            list(parameters),
            list(gradients),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [step] * len(parameters),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

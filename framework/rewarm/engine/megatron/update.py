"""The update rules, as torch optimizers over the shards of Megatron-Core's distributed optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewarm.engine.portable import MOMENTS
from rewarm.kernels import adamw
from rewarm.offload.runtime.execute import GroupStep


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101) with the state layout of Apex's and Transformer
    Engine's FusedAdam: ``step`` in the group, ``exp_avg`` and ``exp_avg_sq`` per parameter.

    The arithmetic is that of :mod:`rewarm.kernels.adamw`, so that a run has the same bits with its state offloaded
    and without; on a GPU without the compiled kernel it is torch's.

    Attributes:
        grad_scale: what every gradient is multiplied by first.
    """

    grad_scale = 1.0

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    def allocate(self) -> None:
        """Create the moments, so that memory runs out at the start if it has to."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            owned = [parameter for parameter in group["params"] if parameter.grad is not None]
            if owned:
                self._update(group, owned, [parameter.grad for parameter in owned])

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        if adamw.runs_on(parameters[0].device):
            constants = GroupStep.of(group).constants(group["step"], self.grad_scale)
            for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
                flat = (each.detach().view(-1) for each in (parameter, *(state[name] for name in MOMENTS), gradient))
                adamw.update(constants, *flat)
            return
        if self.grad_scale != 1:
            torch._foreach_mul_(gradients, self.grad_scale)
        step = torch.tensor(float(group["step"]), device=parameters[0].device)
        torch._fused_adamw_(
            parameters,
            gradients,
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


class GroupStepSGD(GroupStepAdamW):
    """Plain gradient descent with decoupled weight decay. Its moments stay zero; they are kept so that the
    checkpoint has the one layout that the distributed optimizer knows."""

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        if self.grad_scale != 1:
            torch._foreach_mul_(gradients, self.grad_scale)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, gradients, alpha=-group["lr"])

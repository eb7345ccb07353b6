"""The update rules as a torch optimizer over the shards of Megatron-Core's distributed optimizer."""

from __future__ import annotations

from typing import Any

import torch

from rewarm.engine.state import MOMENTS
from rewarm.optimizers.base import UpdateRule


class ShardOptimizer(torch.optim.Optimizer):
    """An update rule with the state layout of Apex's and Transformer Engine's FusedAdam, the one that the distributed
    optimizer saves and loads: ``step`` in the group, ``exp_avg`` and ``exp_avg_sq`` per parameter. A rule that fills
    fewer buffers leaves the others at zero.

    Attributes:
        grad_scale: what every gradient is multiplied by first.
    """

    grad_scale = 1.0

    def __init__(self, groups: list[dict[str, Any]], rule: UpdateRule) -> None:
        self.rule, settings = rule, rule.settings
        defaults = {"lr": 0.0, "step": 0, "weight_decay": settings.weight_decay}
        super().__init__(groups, {**defaults, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon})

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
                gradients = [parameter.grad for parameter in owned]
                self.rule.update(group, owned, gradients, [self.state[each] for each in owned], self.grad_scale)

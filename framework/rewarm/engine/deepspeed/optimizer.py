"""The update rule that DeepSpeed wraps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewarm.config.offload import places_state
from rewarm.config.run import RunConfig
from rewarm.engine.deepspeed.shards import local_shape
from rewarm.engine.deepspeed.update import OffloadedStep, RuleOptimizer, StatelessOptimizer


def build_optimizer(config: RunConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The run's update rule over the model's parameters; norms and biases are not decayed.

    DeepSpeed's CPU Adam is used only where DeepSpeed insists on it.
    """
    settings = config.optimizer
    parameters = list(module.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if len(local_shape(p)) > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if len(local_shape(p)) <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rule = settings.rule(settings)
    if not rule.moments:
        return StatelessOptimizer(groups, rule)
    options: dict[str, Any] = {"lr": 0.0, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}
    if config.deepspeed.needs_cpu_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=True, **options)
    kind = OffloadedStep if places_state(config) else RuleOptimizer
    return kind(groups, rule, fused=True, **options)


def set_learning_rate(wrapper: Any, learning_rate: float) -> None:
    """Give every parameter group the rate of the coming step.

    Args:
        wrapper: DeepSpeed's optimizer, or the plain one of stage 0.
        learning_rate: of the step.
    """
    # What TwinFlow leaves on the device is updated by a second optimizer with a first group of its own.
    for optimizer in (wrapper, getattr(wrapper, "backup_optimizer", None)):
        for group in [] if optimizer is None else optimizer.param_groups:
            group["lr"] = learning_rate

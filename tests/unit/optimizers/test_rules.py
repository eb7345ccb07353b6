"""The update rules by themselves: what each registered one builds, and a rule of an extension under both engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rewarm.config.load import build
from rewarm.config.registry import OPTIMIZERS
from rewarm.config.run import RunConfig
from rewarm.engine.deepspeed.update import RuleOptimizer
from rewarm.engine.megatron.update import ShardOptimizer
from rewarm.errors import UserError
from rewarm.optimizers.base import UpdateRule


def stage(**optimizer: Any) -> RunConfig:
    return build({"name": "x", "model": {}, "data": {"a": "a"}, "optimizer": optimizer})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_the_schema_is_its_own_rule(name: str) -> None:
    section = stage(name=name).optimizer
    assert type(section.rule(section)) is OPTIMIZERS[name].target and OPTIMIZERS[name].summary


class Lion(UpdateRule):
    """Chen et al. 2023, arXiv:2302.06675."""

    uses = ("beta1", "beta2")
    moments = ("exp_avg",)

    def update(self, group: Any, parameters: Any, gradients: Any, states: Any, grad_scale: float) -> None:
        beta1, beta2 = group["betas"]
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            gradient = gradient * grad_scale
            direction = torch.sign(beta1 * state["exp_avg"] + (1 - beta1) * gradient)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * direction)
            state["exp_avg"].mul_(beta2).add_((1 - beta2) * gradient)


@pytest.fixture
def lion() -> Iterator[None]:
    OPTIMIZERS.register("lion")(Lion)
    yield
    del OPTIMIZERS._methods["lion"]


def test_a_rule_of_an_extension_moves_parameters_alike_under_both_engines(lion: None) -> None:
    section = stage(name="lion", beta1=0.9, beta2=0.99, weight_decay=0.1).optimizer
    rule = section.rule(section)
    ours, theirs = (torch.tensor([1.0, -2.0]).requires_grad_() for _ in range(2))
    shards = ShardOptimizer([{"params": [ours], "lr": 0.01}], rule)
    shards.allocate()
    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    pieces = RuleOptimizer([theirs], rule, **options)
    expected, moment = [1.0, -2.0], [0.0, 0.0]
    for gradient in ([0.5, 0.25], [-0.01, 0.25], [0.0, -3.0]):
        for parameter, optimizer in ((ours, shards), (theirs, pieces)):
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
        for i in range(2):
            sign = 0.9 * moment[i] + 0.1 * gradient[i]
            expected[i] = expected[i] * (1 - 0.001) - 0.01 * ((sign > 0) - (sign < 0))
            moment[i] = 0.99 * moment[i] + 0.01 * gradient[i]
    torch.testing.assert_close(ours.detach(), torch.tensor(expected))
    torch.testing.assert_close(theirs, ours)


def test_what_a_rule_does_not_follow_is_refused(lion: None) -> None:
    with pytest.raises(UserError, match="optimizer.epsilon is ignored by optimizer.name=lion"):
        stage(name="lion", epsilon=1e-6)
    with pytest.raises(UserError, match="moves the state of AdamW, and not that of optimizer.name=lion"):
        build({"name": "x", "model": {}, "data": {"a": "a"}, "optimizer": {"name": "lion"}, "offload": {"mode": "cpu"}})


def test_a_name_without_a_rule_is_refused() -> None:
    with pytest.raises(UserError, match="optimizer.name: Input should be 'adamw', 'adamw_8bit' or 'sgd'"):
        stage(name="lion")

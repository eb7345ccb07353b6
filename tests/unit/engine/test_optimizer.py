"""The update against torch's AdamW, and what it does with clipping and with numbers that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ranks import single_workers
from ranks.harness import run_ranks
from rewarm.config.training import OptimizerConfig
from rewarm.engine.megatron.update import ShardOptimizer


def test_adamw_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(5, 3, generator=generator).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    settings = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    chosen = OptimizerConfig(beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.3)
    optimizer = ShardOptimizer([{"params": [ours]}], chosen.rule(chosen))
    optimizer.allocate()
    reference = torch.optim.AdamW([theirs], lr=1.0, **settings)
    for step in range(5):
        ours.grad = torch.randn(5, 3, generator=generator)
        theirs.grad = ours.grad.clone()
        rate = 0.1 / (step + 1)
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = rate
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs)
    assert optimizer.param_groups[0]["step"] == 5


def test_sgd_with_decoupled_decay() -> None:
    weight = torch.tensor([2.0, -4.0]).requires_grad_()
    chosen = OptimizerConfig(name="sgd", weight_decay=0.1)
    optimizer = ShardOptimizer([{"params": [weight], "lr": 0.5}], chosen.rule(chosen))
    optimizer.allocate()
    weight.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([2.0 * 0.95 - 0.5, -4.0 * 0.95 - 1.0]))


def test_clipping_scales_the_update_and_reports_the_norm_before() -> None:
    found = run_ranks(single_workers.sgd_moves, 1, [0.0, 0.25, 1e9])[0]
    (free, free_norm), (clipped, clipped_norm), (loose, loose_norm) = found
    assert free_norm == clipped_norm == loose_norm
    assert free_norm > 0.25
    assert free == pytest.approx(loose)
    assert clipped == pytest.approx(free * 0.25 / free_norm, rel=1e-4)


def test_a_gradient_that_is_not_finite_is_skipped() -> None:
    for outcome in run_ranks(single_workers.not_finite, 2, {"parallel": {"tensor": 2}}):
        assert outcome["skipped"] == [False, True, False]
        assert outcome["weights unchanged by the skipped step"]
        assert outcome["step count"] == 2


@pytest.mark.parametrize("model", [{"family": "qwen2", "qkv_bias": True}, {"family": "qwen3", "qk_norm": True}])
def test_decay_spares_norms_and_biases(model: dict[str, Any]) -> None:
    (decay,) = run_ranks(single_workers.decay_by_name, 1, {"model": model})
    for name, value in decay.items():
        assert value == (0.0 if "norm" in name or name.endswith("bias") else 0.5), name
    assert sum(value == 0 for value in decay.values()) >= 4 * 3 + 1

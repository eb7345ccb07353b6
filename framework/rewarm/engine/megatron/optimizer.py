"""The update: Megatron-Core's distributed optimizer around an AdamW that runs on every device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import _get_param_groups_and_buffers, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from rewarm.config.training import OptimizerConfig
from rewarm.engine import device, ranks
from rewarm.engine.megatron import compat


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101) with the state layout of Apex's and Transformer
    Engine's FusedAdam: ``step`` in the group, ``exp_avg`` and ``exp_avg_sq`` per parameter.

    The arithmetic is torch's fused kernel, on the CPU as on a GPU.
    """

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    def allocate(self) -> None:
        """Create the moments, so that memory runs out at the start if it has to."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}

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
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, gradients, alpha=-group["lr"])


class _ShardedOptimizer(DistributedOptimizer):
    """The distributed optimizer, without one needless copy."""

    def _copy_main_params_to_model_params(self) -> None:
        """fp32 shards are views of the model's parameters: the update has been made in place already."""
        if self.shard_fp32_from_float16_groups and any(self.shard_fp32_from_float16_groups):
            super()._copy_main_params_to_model_params()


class Optimizer:
    """Clips, updates and keeps the settings of the run above those of a loaded checkpoint."""

    def __init__(self, settings: OptimizerConfig, chunks: Sequence[DistributedDataParallel], bf16: bool) -> None:
        self._settings = settings
        kind = GroupStepAdamW if settings.name == "adamw" else GroupStepSGD
        compat.accept_optimizer(kind)
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=0.0,
            min_lr=0.0,
            weight_decay=settings.weight_decay,
            clip_grad=0.0,
            bf16=bf16,
            use_distributed_optimizer=True,
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        )
        groups, buffers = _get_param_groups_and_buffers(
            list(chunks), 0, config, get_standard_config_overrides(config), lambda group: True, "buffers"
        )
        inner = kind(groups, (settings.beta1, settings.beta2), settings.epsilon, settings.weight_decay)
        self.sharded = _ShardedOptimizer(
            inner,
            config,
            None,
            None,
            model_chunks=list(chunks),
            per_model_buffers=buffers,
            data_parallel_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            data_parallel_group_gloo=parallel_state.get_data_parallel_group_gloo(with_context_parallel=True),
            data_parallel_group_idx=parallel_state.get_model_parallel_group().rank(),
            distributed_optimizer_instance_id=0,
        )
        self.sharded.grad_stats_parallel_group = dist.group.WORLD
        self.sharded.tp_group = parallel_state.get_tensor_model_parallel_group()
        inner.allocate()
        self.apply_settings()

    def apply_settings(self) -> None:
        """Put the run's settings into the parameter groups, also after a load that brought others."""
        settings = self._settings
        for group in self.sharded.param_groups:
            group["betas"] = (settings.beta1, settings.beta2)
            group["eps"] = settings.epsilon
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]

    @torch.no_grad()
    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Update the parameters from the reduced gradients. Collective.

        Returns:
            The global gradient norm before clipping, and whether the update was made: not if the norm is not finite.
        """
        self.sharded.prepare_grads()
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            return norm, False
        limit = self._settings.gradient_clipping
        owned = self.sharded.get_parameters()
        if 0 < limit < norm and owned:
            torch._foreach_mul_([parameter.grad for parameter in owned], limit / (norm + 1e-6))
        for group in self.sharded.param_groups:
            group["lr"] = learning_rate
        self.sharded.step_with_ready_grads()
        return norm, True

    def _gradient_norm(self) -> float:
        gradients = self.sharded.get_main_grads_for_grad_norm()
        if gradients:
            squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        else:
            squares = torch.zeros((), dtype=torch.float64, device=device.local_device())
        return math.sqrt(ranks.sum_over_ranks(squares).item())

    @property
    def has_moments(self) -> bool:
        """True under AdamW."""
        return self._settings.name == "adamw"

    @property
    def num_updates(self) -> int:
        """Updates that the moments stand for."""
        return int(self.sharded.param_groups[0]["step"])

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        for group in self.sharded.param_groups:
            group["step"] = value

    def masters(self) -> dict[int, Tensor]:
        """This rank's flat part of each fp32 parameter, by the id of the model's parameter that it updates."""
        sharded = self.sharded
        pairs = (
            (sharded.model_fp32_groups, sharded.shard_fp32_groups),
            (sharded.model_float16_groups, sharded.shard_fp32_from_float16_groups),
        )
        return {
            id(parameter): master
            for models, shards in pairs
            for group, parts in zip(models, shards, strict=True)
            for parameter, master in zip(group, parts, strict=True)
        }

    def weights_changed(self) -> None:
        """Take the model's parameters over into the fp32 main parameters, after they were loaded from elsewhere."""
        self.sharded.reload_model_params()

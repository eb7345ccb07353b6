"""The update: Megatron-Core's distributed optimizer around an AdamW that runs on every device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import _get_param_groups_and_buffers, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rewarm.config.offload import OffloadConfig
from rewarm.config.training import OptimizerConfig
from rewarm.engine import device, ranks
from rewarm.engine.megatron import compat
from rewarm.engine.megatron.offloaded import OffloadedAdamWStep, OffloadedOptimizer
from rewarm.engine.megatron.overlap import Overlap, Replica
from rewarm.engine.megatron.update import ShardOptimizer
from rewarm.engine.portable import MOMENTS


class _ShardedOptimizer(DistributedOptimizer):
    """The distributed optimizer, without one needless copy."""

    def _copy_main_params_to_model_params(self) -> None:
        """fp32 shards are views of the model's parameters: the update has been made in place already."""
        if self.shard_fp32_from_float16_groups and any(self.shard_fp32_from_float16_groups):
            super()._copy_main_params_to_model_params()


class Optimizer:
    """Clips, updates and keeps the settings of the run above those of a loaded checkpoint."""

    def __init__(
        self,
        settings: OptimizerConfig,
        chunks: Sequence[Replica],
        decoder: TransformerConfig,
        offload: OffloadConfig,
    ) -> None:
        self._settings = settings
        offloaded = offload.mode != "none" or settings.eight_bit
        kind = OffloadedAdamWStep if offloaded else ShardOptimizer
        compat.accept_optimizer(kind)
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=0.0,
            min_lr=0.0,
            weight_decay=settings.weight_decay,
            clip_grad=0.0,
            bf16=decoder.bf16,
            use_distributed_optimizer=True,
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        )
        groups, buffers = _get_param_groups_and_buffers(
            list(chunks), 0, config, get_standard_config_overrides(config), lambda group: True, "buffers"
        )
        self._inner = kind(groups, settings.rule(settings))
        self.sharded = (OffloadedOptimizer if offloaded else _ShardedOptimizer)(
            self._inner,
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
        self._inner.allocate()
        if isinstance(self.sharded, OffloadedOptimizer):
            names = {id(parameter): name for chunk in chunks for name, parameter in chunk.module.named_parameters()}
            self.sharded.attach(offload, names, eight_bit=settings.eight_bit)
        self._overlap: Overlap | None = None
        if isinstance(self.sharded, OffloadedOptimizer):
            self._overlap = Overlap(self.sharded, chunks, decoder)
        self.apply_settings()

    def apply_settings(self) -> None:
        """Put the run's settings into the parameter groups, also after a load that brought others."""
        settings = self._settings
        for group in self.sharded.param_groups:
            group["betas"] = (settings.beta1, settings.beta2)
            group["eps"] = settings.epsilon
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]

    def passes(self, number: int, learning_rate: float | None) -> AbstractContextManager[None]:
        """Around the forward and backward passes of a step, so that an offloaded update runs beside them.

        Args:
            number: micro-batches.
            learning_rate: that :meth:`step` will be given; None if no update follows.
        """
        return nullcontext() if self._overlap is None else self._overlap.passes(number, learning_rate)

    def finish(self) -> None:
        """Wait for an update that may still run: only then are parameters and state those of the step. Collective.

        An update that was begun for gradients that will not be used is undone.
        """
        if isinstance(self._inner, OffloadedAdamWStep):
            self._inner.offload.finish()

    @torch.no_grad()
    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Update the parameters from the reduced gradients. Collective.

        An offloaded update may run on beside the next forward pass, until :meth:`finish`.

        Returns:
            The global gradient norm before clipping, and whether the update was made: not if the norm is not finite.
        """
        self.sharded.prepare_grads()
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            self.finish()
            return norm, False
        limit = self._settings.gradient_clipping
        self._inner.grad_scale = limit / (norm + 1e-6) if 0 < limit < norm else 1.0
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

    def gradient(self) -> Tensor:
        """A copy of this rank's own part of the reduced gradient, fp32 [n]; over all ranks each element is there
        once."""
        self.sharded.prepare_grads()
        found = self.sharded.get_main_grads_for_grad_norm()
        place = device.local_device()
        return torch.cat([part.float().flatten() for part in found]) if found else torch.zeros(0, device=place)

    @property
    def has_moments(self) -> bool:
        """True under AdamW."""
        return self._settings.has_moments

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

    def main_changed(self) -> None:
        """Take this rank's fp32 main parameters over into its part of the model's; the others are not told."""
        self.sharded._copy_main_params_to_model_params()

    def state_of(self, parameter: Any) -> dict[str, Tensor]:
        """This rank's part of a parameter's moments; nothing where it has none."""
        if parameter not in self.sharded.model_param_gbuf_map:
            return {}
        found = self.sharded._get_main_param_and_optimizer_states(parameter)
        return {kind: found[kind] for kind in MOMENTS if kind in found}

    @torch.no_grad()
    def set_main(self, parameter: Any, values: Tensor) -> None:
        """Set this rank's part of a parameter's fp32 main values, and leave its moments as they are.

        Args:
            parameter: of the model.
            values: fp32 [as the parameter], which it was or is set to as well.
        """
        sharded = self.sharded
        if parameter not in sharded.model_param_gbuf_map:
            return
        span = sharded._get_model_param_range_map(parameter)["param"]
        tensors = sharded._get_main_param_and_optimizer_states(parameter)
        main = values.reshape(-1)[span.start : span.end].to(parameter.device)
        sharded._set_main_param_and_optimizer_states(parameter, {**tensors, "param": main})

    def profiled(self, seconds: float, forward: float, backward: float, passes: int) -> None:
        """Take notice of the time and memory of a step without its update. Collective.

        Args:
            seconds: of the whole.
            forward, backward: seconds of one pass of each kind.
            passes: micro-batches.
        """
        if isinstance(self._inner, OffloadedAdamWStep):
            hides = None if self._inner.whole else (forward, backward, passes)
            self._inner.offload.profiled(seconds, device.peak_memory(), hides)

    def close(self) -> None:
        """End what runs beside the step. Not collective."""
        if isinstance(self._inner, OffloadedAdamWStep):
            self._inner.offload.close()

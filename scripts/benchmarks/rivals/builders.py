"""This project's offload, DeepSpeed's and Megatron-Core's around the same weights.

DeepSpeed is used bare and not through this project's engine: its own optimizer, its own defaults for gradients, and a
loop as its users write it. Megatron-Core's HybridDeviceOptimizer is put around the model that this project's engine
builds, in place of this project's optimizer.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from rewarm.engine.base import Batch
from rewarm.model.architecture import Architecture
from rewarm.offload.planning.simulate import Timeline
from rivals.contestant import BETAS, CLIPPING, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Order


class RivalMissing(Exception):
    """Something that a rival needs is not here."""


def configuration(order: Order, offload: dict[str, Any], engine: str = "megatron") -> Any:
    """A run's configuration."""
    from rewarm.config.load import build

    shape = order.shape
    return build(
        {
            "name": "rivals",
            "engine": engine,
            "data": {"noise": "noise"},
            "precision": "bfloat16",
            "model": {
                "num_layers": shape.num_layers,
                "hidden_size": shape.hidden_size,
                "ffn_hidden_size": shape.ffn_hidden_size,
                "num_attention_heads": shape.num_attention_heads,
                "vocab_size": shape.vocab_size,
                "max_position_embeddings": shape.sequence_length,
            },
            "batch": {
                "sequence_length": shape.sequence_length,
                "global_batch_size": order.micro_batches,
                "micro_batch_size": 1,
            },
            "optimizer": {
                "beta1": BETAS[0],
                "beta2": BETAS[1],
                "epsilon": EPSILON,
                "weight_decay": WEIGHT_DECAY,
                "gradient_clipping": CLIPPING,
            },
            "offload": offload,
        }
    )


class Ours:
    """This project's engine with its optimizer state where a mode of ``offload`` puts it."""

    def __init__(self, order: Order, mode: str) -> None:
        offload: dict[str, Any] = {"mode": mode}
        if mode != "none":
            offload |= {"subgroup_size": order.subgroup, "stand_in": order.link}
        self.timelines: list[Timeline] = []
        self.engine = self._engine(configuration(order, offload))
        self.parameters = self.engine.parameter_count()
        if mode != "none":
            self.offload = self.engine._optimizer._inner.offload
            self._listen(self.offload.inner)

    def _engine(self, config: Any) -> Any:
        from rewarm.engine.megatron.engine import MegatronEngine

        return MegatronEngine(config, Architecture.from_config(config.model, config.model.vocab_size), ["noise"])

    def _listen(self, inner: Any) -> None:
        finish = inner.finish

        def heard() -> Timeline | None:
            found: Timeline | None = finish()
            if found is not None:
                self.timelines.append(found)
            return found

        inner.finish = heard

    def rehearse(self, tokens: Any) -> None:
        """See :class:`~rivals.contestant.Trainer`."""
        self.engine.dry_run(self._batch(tokens))

    def step(self, tokens: Any) -> float:
        """See :class:`~rivals.contestant.Trainer`."""
        return float(self.engine.train_step(self._batch(tokens), LEARNING_RATE).loss)

    def finish(self) -> None:
        """See :class:`~rivals.contestant.Trainer`."""
        self.engine._optimizer.finish()

    @staticmethod
    def _batch(tokens: Any) -> Batch:
        return Batch(tokens, np.zeros(len(tokens), dtype=np.int64))


class Hybrid(Ours):
    """Megatron-Core's HybridDeviceOptimizer around the model of this project's engine."""

    def __init__(self, order: Order) -> None:
        if not torch.cuda.is_available():
            raise RivalMissing("HybridDeviceOptimizer moves state between a CUDA device and its host; there is none")
        self._fraction = order.hybrid_fraction
        super().__init__(order, "none")

    def _engine(self, config: Any) -> Any:
        from rewarm.engine.megatron import engine

        fraction = self._fraction

        class Update(HybridUpdate):
            """With the fraction that was ordered."""

            def __init__(self, settings: Any, chunks: Any, decoder: Any, offload: Any) -> None:
                super().__init__(chunks, decoder.bf16, fraction)

        engine.Optimizer = Update  # type: ignore[assignment, misc]
        return super()._engine(config)


class HybridUpdate:
    """In the place of this project's optimizer in its Megatron engine: what ``--optimizer-cpu-offload`` builds."""

    def __init__(self, chunks: Any, bf16: bool, fraction: float) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides

        _without_transformer_engine()
        config = OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            min_lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_eps=EPSILON,
            clip_grad=CLIPPING,
            bf16=bf16,
            use_distributed_optimizer=True,
            use_precision_aware_optimizer=True,
            optimizer_cpu_offload=True,
            optimizer_offload_fraction=fraction,
            overlap_cpu_optimizer_d2h_h2d=True,
        )
        self.inner = get_megatron_optimizer(
            config, list(chunks), get_standard_config_overrides(config), use_gloo_process_groups=False
        )

    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Clip and update; the rate is set once and for all."""
        updated, norm, _ = self.inner.step()
        return float(norm), bool(updated)

    def passes(self, number: int, learning_rate: float | None) -> AbstractContextManager[None]:
        """Nothing of it runs beside the forward and backward passes."""
        return nullcontext()

    def finish(self) -> None:
        """An update has ended when :meth:`step` returns."""

    def profiled(self, *seconds: float) -> None:
        """Nothing is placed by what a rehearsal shows."""


def _without_transformer_engine() -> None:
    """Let the precision-aware path, which HybridDeviceOptimizer belongs to, be chosen without Transformer Engine.

    It needs nothing of it, but Megatron-Core 0.16 compares its version, and there is none to compare.
    """
    from importlib.util import find_spec

    from megatron.core.optimizer import optimizer_config

    if find_spec("transformer_engine") is None:
        optimizer_config.is_te_min_version = lambda *arguments, **more: False


class DeepSpeed:
    """Bare DeepSpeed with its own CPU Adam: ZeRO-Offload under stage 2 and 3, and TwinFlow."""

    def __init__(self, order: Order) -> None:
        deepspeed = self._load()
        config = configuration(order, {"mode": "none"}, engine="deepspeed")
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        module = self._module(config, deepspeed)
        self.parameters = sum(parameter.numel() for parameter in module.parameters())
        matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in module.parameters() if parameter.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.engine = deepspeed.initialize(
            model=module, model_parameters=groups, config=self._json(order), dist_init_required=False
        )[0]

    def _load(self) -> Any:
        from rewarm.config.deepspeed import DeepSpeedConfig
        from rewarm.engine import ranks
        from rewarm.engine.deepspeed import compat
        from rewarm.engine.deepspeed.extensions import is_built, prepare_extensions

        settings = DeepSpeedConfig(zero_stage=3, offload_optimizer="cpu", offload_ratio=0.5)
        if not is_built("cpu_adam", settings):
            raise RivalMissing("cpu_adam is not compiled here: python scripts/deepspeed_extensions.py cpu_adam")
        prepare_extensions(settings)
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"  # CUDA's default, where Megatron-Core wants one
        ranks.join(10)
        deepspeed = compat.load_deepspeed()
        compat.adopt_process_group(deepspeed)
        return deepspeed

    def _module(self, config: Any, deepspeed: Any) -> Any:
        from rewarm.engine.deepspeed.model import build_model
        from rewarm.model.description import HuggingFaceModel, from_scratch
        from rewarm.model.initial import RandomTensors

        architecture = Architecture.from_config(config.model, config.model.vocab_size)
        description = from_scratch(architecture, "deepspeed", "bfloat16")
        assert isinstance(description, HuggingFaceModel)
        module = build_model(config, description, deepspeed, {})
        drawn = RandomTensors(
            {name: tuple(parameter.shape) for name, parameter in module.named_parameters()},
            seed=config.seed,
            initializer_range=description.config["initializer_range"],
            num_layers=description.config["num_hidden_layers"],
        )
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(drawn.draw(name))
        return module

    @staticmethod
    def _json(order: Order) -> dict[str, Any]:
        moved: dict[str, Any] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if order.name == "twinflow":
            moved["ratio"] = order.twinflow_ratio
        zero: dict[str, Any] = {
            "stage": 2 if order.name == "deepspeed-2" else 3,
            "offload_optimizer": moved,
            "overlap_comm": True,
            "contiguous_gradients": True,
        }
        if zero["stage"] == 3:
            zero["sub_group_size"] = 2 * order.subgroup
        rule = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": WEIGHT_DECAY}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": order.micro_batches,
            "gradient_clipping": CLIPPING,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": rule},
            "zero_optimization": zero,
        }

    def rehearse(self, tokens: Any) -> None:
        """See :class:`~rivals.contestant.Trainer`."""

    def step(self, tokens: Any) -> float:
        """See :class:`~rivals.contestant.Trainer`."""
        from torch.nn.functional import cross_entropy

        losses = []
        for row in torch.from_numpy(tokens).to(self._device):
            logits = self.engine(input_ids=row[None, :-1], use_cache=False).logits
            loss = cross_entropy(logits.float().flatten(0, 1), row[1:])
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    def finish(self) -> None:
        """See :class:`~rivals.contestant.Trainer`."""

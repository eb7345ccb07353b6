"""Choosing the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from rewarm.config.run import RunConfig
from rewarm.engine.base import Engine
from rewarm.model.architecture import Architecture
from rewarm.model.description import HuggingFaceModel, ModelDescription


def build_engine(config: RunConfig, model: ModelDescription, domain_names: Sequence[str]) -> Engine:
    """Join the ranks and build the model and its optimizer. Collective.

    The weights are random, drawn from ``config.seed`` and the same on every layout of either engine, unless
    ``config.parent`` is set: then they are undefined until :meth:`~rewarm.engine.base.Engine.load` or
    :meth:`~rewarm.engine.base.Engine.import_huggingface` fills them.

    Args:
        config: the resolved configuration.
        model: of ``config.model`` or of the parent; an ``Architecture`` for megatron, a ``HuggingFaceModel`` for
            deepspeed.
        domain_names: the domains that :attr:`~rewarm.engine.base.Batch.domains` counts, in that order.

    Raises:
        rewarm.errors.UserError: if the layout does not fit the ranks, the model or the batch.
    """
    if config.engine == "megatron":
        from rewarm.engine.megatron.engine import MegatronEngine

        assert isinstance(model, Architecture), "engine=megatron builds from an Architecture"
        return MegatronEngine(config, model, domain_names)
    if config.engine == "deepspeed":
        from rewarm.engine.deepspeed.engine import DeepSpeedEngine

        assert isinstance(model, HuggingFaceModel), "engine=deepspeed builds from a HuggingFaceModel"
        return DeepSpeedEngine(config, model, domain_names)
    assert_never(config.engine)


def prepare_engine(config: RunConfig) -> None:
    """Do what needs doing once on a machine before its ranks start.

    Raises:
        rewarm.errors.UserError: if an extension cannot be compiled.
    """
    if config.engine == "megatron":
        return
    if config.engine == "deepspeed":
        from rewarm.engine.deepspeed.extensions import prepare_extensions

        prepare_extensions(config.deepspeed)
        return
    assert_never(config.engine)

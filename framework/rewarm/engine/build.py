"""Choosing the engine."""

from __future__ import annotations

from collections.abc import Sequence

from rewarm.config.run import RunConfig
from rewarm.engine.base import Engine
from rewarm.model.architecture import Architecture


def build_engine(config: RunConfig, architecture: Architecture, domain_names: Sequence[str]) -> Engine:
    """Join the ranks and build the model and its optimizer. Collective.

    The weights are random, drawn from ``config.seed`` and the same on every layout, unless ``config.parent`` is set:
    then they are undefined until :meth:`~rewarm.engine.base.Engine.load` or
    :meth:`~rewarm.engine.base.Engine.import_huggingface` fills them.

    Args:
        config: the resolved configuration.
        architecture: the model, of ``config.model`` or of the parent.
        domain_names: the domains that :attr:`~rewarm.engine.base.Batch.domains` counts, in that order.

    Raises:
        rewarm.errors.UserError: if the layout does not fit the ranks, the model or the batch.
    """
    from rewarm.engine.megatron.engine import MegatronEngine

    return MegatronEngine(config, architecture, domain_names)

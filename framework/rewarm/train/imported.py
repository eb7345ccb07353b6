"""Does an engine compute what transformers computes from the same folder? Asked once, at every import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rewarm.config.run import RunConfig
from rewarm.engine.base import Engine
from rewarm.errors import UserError
from rewarm.model.description import HuggingFaceModel, ModelDescription

NUM_WINDOWS = 4
MOST_PARAMETERS = 10_000_000_000
"""Above this one process would take minutes, for which all ranks would wait."""
_TOLERANCE = {"float32": 5e-3, "bfloat16": 2e-2}
"""Nats per token. Matrix products of a GPU's fp32 may have ten bits; what rounding to bfloat16 does is measured too."""


@dataclass(frozen=True, slots=True)
class _Compared:
    theirs: np.ndarray
    """float64 [W]; nats per token under transformers in fp32."""
    rounded: np.ndarray
    """The same in the run's precision."""


def check_import(engine: Engine, folder: Path, config: RunConfig, model: ModelDescription) -> str:
    """Compare the losses of a few windows of random tokens with those of transformers, on rank 0's host. Collective.

    Every weight has been looked at before, by name, shape and for values that are not finite: each rank has read its
    own part. What that cannot see is a part of the model that means something else to the engine. One process runs the
    folder under transformers where the host memory allows it, in fp32.

    Args:
        engine: filled from the folder.
        folder: the Hugging Face folder.
        config: of the run.
        model: what the engine runs.

    Returns:
        What was compared, or why not; on every rank.

    Raises:
        UserError: on every rank, if the losses differ by more than rounding does.
    """
    why = engine.broadcast(_too_large(engine, config) if engine.is_main else None)
    if why is not None:
        return f"not compared with transformers: {why}"
    parallel = config.parallel
    length = min(config.batch.sequence_length, 32 * parallel.tensor * parallel.context)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (NUM_WINDOWS, length + 1), dtype=np.int64)
    state = engine.rng_state()
    ours = engine.evaluate(tokens, 1) / length
    found: _Compared | str | None = None
    if engine.is_main:
        found = _transformers(folder, tokens, config)
    found = engine.broadcast(found)
    engine.set_rng_state(state)
    if not isinstance(found, _Compared):
        return f"not compared with transformers: {found}"
    return _judge(ours, found, folder, config)


def _too_large(engine: Engine, config: RunConfig) -> str | None:
    """Why transformers is not asked, on the rank that would."""
    from rewarm.offload.runtime.profile import available_memory

    size, free = engine.parameter_count(), available_memory()
    if size > MOST_PARAMETERS:
        return f"{size / 1e9:.3g} billion parameters would take one process too long"
    needed = 4.0 * size * 1.25  # the weights in fp32, and room to load them
    if needed > free / 2:
        return f"it would take {needed / 1e9:.3g} GB of host memory, of which {free / 1e9:.3g} GB are free"
    return None


def _transformers(folder: Path, tokens: np.ndarray, config: RunConfig) -> _Compared | str:
    """Losses under transformers, or why there are none."""
    from rewarm.model.reference import window_losses

    length, trust = tokens.shape[1] - 1, config.deepspeed.trust_remote_code
    try:
        theirs = window_losses(folder, tokens, 1, trust_remote_code=trust) / length
        rounded = theirs
        if config.precision != "float32":
            rounded = window_losses(folder, tokens, 1, dtype=config.precision, trust_remote_code=trust) / length
    except (UserError, ImportError, MemoryError, RuntimeError) as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return _Compared(theirs, rounded)


def _judge(ours: np.ndarray, found: _Compared, folder: Path, config: RunConfig) -> str:
    distance, rounding = _distance(ours, found.theirs), _distance(found.rounded, found.theirs)
    allowed = _TOLERANCE[config.precision] + 4 * rounding
    figures = f"{ours.mean():.5f} nats per token for {found.theirs.mean():.5f} on {len(ours)} windows of random tokens"
    if not distance <= allowed:
        raise UserError(
            f"engine={config.engine} does not compute what transformers computes from {folder}: {figures}, off by "
            f"{distance:.3g} where {allowed:.3g} is allowed in {config.precision}",
            fix="do not train this model with this engine, and report it with its config.json; "
            f"engine={'megatron' if config.engine == 'deepspeed' else 'deepspeed'} may run it",
        )
    return f"computes what transformers does: {figures}"


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Root of the mean square over the windows; not a number if one of them is not."""
    return math.sqrt(float(np.square(ours - theirs).mean()))


def notes_on(model: ModelDescription) -> list[str]:
    """What the user should know of how a model is trained."""
    if not isinstance(model, HuggingFaceModel) or model.num_experts is None:
        return []
    text = f"{model.num_experts} experts, of which every rank updates all (no expert parallelism)"
    factor = model.router_loss_factor
    if factor:
        text += f"; the router's own loss (router_aux_loss_coef={factor:g}) is not part of the loss here"
    return [text]

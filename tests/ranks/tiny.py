"""A small model and its data, the same on every layout."""

from __future__ import annotations

from typing import Any

import numpy as np

from rewarm.config.load import build
from rewarm.config.run import RunConfig
from rewarm.engine.base import Batch, Engine
from rewarm.engine.build import build_engine
from rewarm.model.architecture import Architecture

VOCAB_SIZE = 500  # not a multiple of the padding
SEQUENCE_LENGTH = 32
GLOBAL_BATCH_SIZE = 8
DOMAINS = ("even", "odd", "absent")


def tiny_config(**settings: Any) -> RunConfig:
    """Four layers, 64 wide, 4 query heads in 2 groups. ``settings`` are sections, merged one level deep."""
    values: dict[str, Any] = {
        "name": "tiny",
        "data": {name: name for name in DOMAINS},
        "duration": "100 steps",
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 160,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB_SIZE,
        },
        "batch": {
            "sequence_length": SEQUENCE_LENGTH,
            "global_batch_size": GLOBAL_BATCH_SIZE,
            "micro_batch_size": 1,
        },
        "optimizer": {"gradient_clipping": 0.5},
    }
    for key, value in settings.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return build(values)


def tiny_engine(settings: dict[str, Any]) -> Engine:
    """An engine for :func:`tiny_config` on the ranks of this process."""
    config = tiny_config(**settings)
    assert config.model is not None
    return build_engine(config, Architecture.from_config(config.model, VOCAB_SIZE), DOMAINS)


def global_batch(step: int) -> Batch:
    """A learnable batch: noisy arithmetic sequences, of the first two domains in turn."""
    rng = np.random.default_rng(step)
    start = rng.integers(0, VOCAB_SIZE, (GLOBAL_BATCH_SIZE, 1))
    stride = rng.integers(1, 4, (GLOBAL_BATCH_SIZE, 1))
    tokens = (start + stride * np.arange(SEQUENCE_LENGTH + 1)) % VOCAB_SIZE
    return Batch(tokens, np.arange(GLOBAL_BATCH_SIZE) % 2)


def local_batch(engine: Engine, step: int) -> Batch:
    """This data-parallel rank's share of the global batch."""
    whole = global_batch(step)
    mine = slice(engine.data_parallel_rank, None, engine.data_parallel_size)
    return Batch(whole.tokens[mine].copy(), whole.domains[mine])

"""What the ranks of the committed losses run."""

from __future__ import annotations

from typing import Any

from ranks.tiny import DOMAINS, VOCAB_SIZE, local_batch, tiny_config
from rewarm.engine.base import StepResult
from rewarm.engine.build import build_engine
from rewarm.model.architecture import Architecture
from rewarm.model.description import from_scratch

LEARNING_RATE = 1e-3


def train_from_scratch(settings: dict[str, Any], steps: int) -> list[StepResult]:
    """Train a small model from random weights, the same ones under both engines."""
    config = tiny_config(**settings)
    assert config.model is not None
    architecture = Architecture.from_config(config.model, VOCAB_SIZE)
    engine = build_engine(config, from_scratch(architecture, config.engine, config.precision), DOMAINS)
    results = [engine.train_step(local_batch(engine, step), LEARNING_RATE) for step in range(steps)]
    engine.close()
    return results

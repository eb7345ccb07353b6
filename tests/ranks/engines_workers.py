"""What the ranks run to hold one engine against the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ranks.deepspeed_models import LEARNING_RATE, deepspeed_config, masked_batch
from ranks.deepspeed_workers import share, weights
from ranks.tiny import DOMAINS, VOCAB_SIZE, global_batch, tiny_config
from rewarm.engine.base import Engine, StepResult
from rewarm.engine.build import build_engine
from rewarm.model.architecture import Architecture
from rewarm.model.description import describe, from_scratch


def train(folder: Path, settings: dict[str, Any], count: int) -> list[StepResult]:
    """Train from a folder's weights with AdamW."""
    engine = build_engine(deepspeed_config(folder, **settings), describe(folder, settings["engine"]), DOMAINS)
    engine.import_huggingface(folder)
    results = [engine.train_step(share(engine, global_batch(step)), LEARNING_RATE) for step in range(count)]
    engine.close()
    return results


def descend(folder: Path, settings: dict[str, Any], scratch: Path) -> tuple[StepResult, dict[str, np.ndarray]]:
    """One plain gradient step at a learning rate of 1 on windows that count very different numbers of targets."""
    sgd = {"name": "sgd", "weight_decay": 0.0, "gradient_clipping": 0.0}
    config = deepspeed_config(folder, **{**settings, "optimizer": sgd})
    engine = build_engine(config, describe(folder, settings["engine"]), DOMAINS)
    engine.import_huggingface(folder)
    result = engine.train_step(share(engine, masked_batch(0)), 1.0)
    found = weights(engine, scratch)
    engine.close()
    return result, found


def random_weights(settings: dict[str, Any], scratch: Path) -> dict[str, np.ndarray]:
    """What a model without parent starts from."""
    config = tiny_config(**settings)
    assert config.model is not None
    architecture = Architecture.from_config(config.model, VOCAB_SIZE)
    engine = build_engine(config, from_scratch(architecture, config.engine, config.precision), DOMAINS)
    found = weights(engine, scratch)
    engine.close()
    return found


def hand_over(folder: Path, precision: str, engines: Sequence[str], target: Path) -> list[list[StepResult]]:
    """Train two steps, hand the state to the next engine, train two more steps under either."""
    engines = [engines[0], *engines]
    results = []
    for number, name in enumerate(engines):
        config = deepspeed_config(folder, engine=name, precision=precision)
        engine = build_engine(config, describe(folder, name), DOMAINS)
        if number == 0:
            engine.import_huggingface(folder)
            _steps(engine, 0)
        else:
            engine.load_portable(target / str(number - 1))
        (target / str(number)).mkdir()
        engine.save_portable(target / str(number))
        results.append(_steps(engine, 2))
        engine.close()
    return results


def _steps(engine: Engine, first: int) -> list[StepResult]:
    return [engine.train_step(share(engine, global_batch(step)), LEARNING_RATE) for step in (first, first + 1)]

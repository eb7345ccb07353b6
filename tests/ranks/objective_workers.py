"""What the ranks of either engine run to show that a weighted loss is reduced rightly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ranks.deepspeed_models import deepspeed_config, masked_batch
from ranks.deepspeed_workers import weights
from ranks.tiny import DOMAINS
from rewarm.engine.base import Batch, Engine, GradientStatistics, StepResult
from rewarm.engine.build import build_engine
from rewarm.model.architecture import Architecture
from rewarm.model.description import HuggingFaceModel
from rewarm.model.huggingface import architecture_from_huggingface

FACTORS = np.array([0.1, 3.0, 0.0, 2.5, 1.0, 0.4, 7.0, 0.6])
"""Of the windows of the global batch; not the same on any two ranks."""


@contextmanager
def opened(folder: Path, settings: dict[str, Any]) -> Iterator[Engine]:
    """An engine of the kind that ``settings`` name, filled from a folder; the process group stays for the next."""
    config = deepspeed_config(folder, **settings)
    if config.engine == "deepspeed":
        engine: Engine = build_engine(config, HuggingFaceModel.from_folder(folder), DOMAINS)
    else:
        values = json.loads(json.dumps(architecture_from_huggingface(folder).to_dict()))
        engine = build_engine(config, Architecture.from_dict(values), DOMAINS)
    engine.import_huggingface(folder)
    yield engine
    if config.engine == "deepspeed":
        engine.release()  # type: ignore[attr-defined]
    else:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()


def weighted_batch(step: int, masked: bool) -> Batch:
    """The global batch of a step with factors, and with masks or without."""
    batch = masked_batch(step)
    return Batch(batch.tokens, batch.domains, batch.loss_mask if masked else None, FACTORS)


def share(engine: Engine, whole: Batch) -> Batch:
    """This data-parallel rank's part of a global batch."""
    mine = slice(engine.data_parallel_rank, None, engine.data_parallel_size)
    parts = [None if part is None else part[mine].copy() for part in (whole.loss_mask, whole.loss_weights)]
    return Batch(whole.tokens[mine].copy(), whole.domains[mine], *parts)


def weighted_steps(
    folder: Path, cases: Sequence[dict[str, Any]], masked: bool, scratch: Path
) -> list[tuple[StepResult, dict[str, np.ndarray]]]:
    """One step of each configuration at a learning rate of 1, and the weights after it."""
    found = []
    for settings in cases:
        with opened(folder, settings) as engine:
            result = engine.train_step(share(engine, weighted_batch(0, masked)), 1.0)
            found.append((result, weights(engine, scratch)))
    return found


def held_out() -> list[np.ndarray]:
    """Windows of three domains, of different numbers, none a multiple of the chunk of 2."""
    windows = [masked_batch(100 + number).tokens[:count] for number, count in enumerate((5, 3, 8))]
    # transformers gives the embedding of the padding token, number 2, no gradient.
    return [np.where(tokens == 2, 3, tokens) for tokens in windows]


def compared_gradients(
    folder: Path, cases: Sequence[dict[str, Any]], scratch: Path
) -> list[tuple[GradientStatistics, bool, dict[str, np.ndarray]]]:
    """What each configuration makes of the domains' gradients, if the random state stayed, and the weights after the
    step that follows."""
    found = []
    for settings in cases:
        with opened(folder, settings) as engine:
            random = engine.rng_state()
            statistics = engine.domain_gradients(held_out(), 2)
            same = torch.equal(_cpu(random), _cpu(engine.rng_state()))
            engine.train_step(share(engine, weighted_batch(0, True)), 1.0)
            found.append((statistics, same, weights(engine, scratch)))
    return found


def _cpu(state: Any) -> torch.Tensor:
    return state["cpu"] if "cpu" in state else state["device"]["cpu"]

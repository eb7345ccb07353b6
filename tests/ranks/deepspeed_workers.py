"""What the ranks of the deepspeed engine run; several configurations in one start, which is what takes time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks.deepspeed_models import LEARNING_RATE, deepspeed_config, masked_batch
from ranks.tiny import DOMAINS, global_batch
from rewarm.engine.base import Batch, StepResult
from rewarm.engine.deepspeed.engine import DeepSpeedEngine
from rewarm.model.description import HuggingFaceModel


@contextmanager
def opened(folder: Path, settings: dict[str, Any], *, fill: bool = True) -> Iterator[DeepSpeedEngine]:
    """An engine that goes when the block ends and leaves the process group for the next one."""
    engine = DeepSpeedEngine(deepspeed_config(folder, **settings), HuggingFaceModel.from_folder(folder), DOMAINS)
    if fill:
        engine.import_huggingface(folder)
    yield engine
    engine.release()


def share(engine: DeepSpeedEngine, whole: Batch) -> Batch:
    """This data-parallel rank's part of a global batch."""
    mine = slice(engine.data_parallel_rank, None, engine.data_parallel_size)
    mask = None if whole.loss_mask is None else whole.loss_mask[mine].copy()
    return Batch(whole.tokens[mine].copy(), whole.domains[mine], mask)


def steps(engine: DeepSpeedEngine, first: int, count: int, *, masked: bool = False) -> list[StepResult]:
    """Train on the batches of some steps."""
    batch = masked_batch if masked else global_batch
    return [engine.train_step(share(engine, batch(step)), LEARNING_RATE) for step in range(first, first + count)]


def train(folder: Path, cases: Sequence[dict[str, Any]], count: int, masked: bool = False) -> list[list[StepResult]]:
    """Train each configuration from the folder's weights."""
    results = []
    for settings in cases:
        with opened(folder, settings) as engine:
            results.append(steps(engine, 0, count, masked=masked))
    return results


def weights(engine: DeepSpeedEngine, scratch: Path) -> dict[str, np.ndarray]:
    """The model through an export, on every rank."""
    from safetensors.torch import load_file

    engine.export_huggingface(scratch, tokenizer=None, replace=True)
    engine.barrier()
    found = {name: tensor.numpy() for name, tensor in load_file(scratch / "model.safetensors").items()}
    engine.barrier()
    return found


def one_step(folder: Path, cases: Sequence[dict[str, Any]], scratch: Path) -> list[dict[str, np.ndarray]]:
    """The weights after one step of each configuration."""
    found = []
    for settings in cases:
        with opened(folder, settings) as engine:
            steps(engine, 0, 1)
            found.append(weights(engine, scratch))
    return found


def threads() -> int:
    """Threads that torch uses here."""
    return torch.get_num_threads()

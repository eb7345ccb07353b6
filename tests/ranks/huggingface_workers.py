"""What the ranks run to import and export Hugging Face folders."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewarm.config.load import build
from rewarm.engine.build import build_engine
from rewarm.engine.megatron.engine import MegatronEngine
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.huggingface import architecture_from_huggingface

Measured = dict[str, np.ndarray]


@contextmanager
def _engine(folder: Path, settings: dict[str, Any], **change: Any) -> Iterator[MegatronEngine]:
    """An engine for a folder, its process group left for the next one."""
    from megatron.core import parallel_state

    values = {
        "name": "imported",
        "parent": str(folder),
        "data": {"none": "none"},
        "batch": {"sequence_length": 32, "global_batch_size": 4, "micro_batch_size": 1},
        "megatron": {"vocab_divisor": 16},
    }
    # As a checkpoint hands it on.
    architecture = Architecture.from_dict(json.loads(json.dumps(architecture_from_huggingface(folder).to_dict())))
    engine = build_engine(build(values | settings), replace(architecture, **change), ["none"])
    assert isinstance(engine, MegatronEngine)
    yield engine
    parallel_state.destroy_model_parallel()


def round_trips(
    root: Path, names: Sequence[str], output: Path, settings: dict[str, Any], tokens: np.ndarray, dtype: str
) -> dict[str, Measured]:
    """Import each folder, measure it, and export it to ``output / name``.

    Returns:
        For each name, "losses" float64 [B] of the windows and "logits" float32 [L, vocab_size] after the first
        1, 8 and 30 tokens of the first window.
    """
    measured: dict[str, Measured] = {}
    for name in names:
        with _engine(root / name, settings) as engine:
            engine.import_huggingface(root / name)
            logits = np.stack([engine.next_token_logits(tokens[0, :length]) for length in (1, 8, 30)])
            measured[name] = {"losses": engine.evaluate(tokens, 2), "logits": logits}
            engine.export_huggingface(output / name, tokenizer=root / name, dtype=dtype)
    return measured


def with_another_theta(folder: Path, settings: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Losses of an import into a model whose rotary base is twice what config.json says."""
    theta = architecture_from_huggingface(folder).rope_theta * 2
    with _engine(folder, settings, rope_theta=theta) as engine:
        engine.import_huggingface(folder)
        return engine.evaluate(tokens, 2)


def failed_exports(folder: Path, output: Path, settings: dict[str, Any]) -> list[str]:
    """Messages of an export onto an existing folder, into an unwritable place, and onto a full disk."""
    with _engine(folder, settings) as engine:
        engine.import_huggingface(folder)
        messages = [_message(engine, folder), _message(engine, folder / "config.json" / "export")]
        if engine.rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        messages.append(_message(engine, output))
        if engine.rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        engine.export_huggingface(output, tokenizer=None)
        return messages


def _message(engine: MegatronEngine, folder: Path) -> str:
    try:
        engine.export_huggingface(folder, tokenizer=None)
    except UserError as error:
        return error.message
    return "nothing was wrong"


def bytes_read(folder: Path, settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes of tensor data that this rank read from the folder, and bytes of its own parameters."""
    from rewarm.model.safetensors_io import TensorFolder

    total = 0
    read = TensorFolder.read

    def counting(self: TensorFolder, *arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal total
        tensor = read(self, *arguments, **options)
        total += tensor.nbytes
        return tensor

    TensorFolder.read = counting  # type: ignore[method-assign]
    with _engine(folder, settings) as engine:
        engine.import_huggingface(folder)
        return total, sum(parameter.nbytes for chunk in engine.chunks for parameter in chunk.parameters())

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
from rewarm.engine.base import Batch
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


def one_step(folder: Path, output: Path, settings: dict[str, Any], tokens: np.ndarray, learning_rate: float) -> float:
    """Import a folder, take one step on the windows, and export what it makes of the weights; the gradient norm."""
    with _engine(folder, settings) as engine:
        engine.import_huggingface(folder)
        mine = tokens[engine.data_parallel_rank :: engine.data_parallel_size]
        result = engine.train_step(Batch(mine, np.zeros(len(mine), dtype=np.int64)), learning_rate)
        engine.export_huggingface(output, tokenizer=None, dtype="float32")
        return result.grad_norm


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


def main_parameters(folder: Path, settings: dict[str, Any], checkpoint: Path) -> dict[str, float]:
    """Largest distance of this rank's fp32 main parameters in a bfloat16 run from the folder's own values: after an
    import, and after a start from a float32 checkpoint of the folder. And of the parameters that it computes with."""
    with _engine(folder, settings | {"precision": "float32"}) as engine:
        engine.import_huggingface(folder)
        if engine.rank == 0:
            checkpoint.mkdir(exist_ok=True)
        engine.barrier()
        engine.save(checkpoint, optimizer=False)
    found: dict[str, float] = {}
    for name in ("imported", "loaded"):
        with _engine(folder, settings | {"precision": "bfloat16"}) as engine:
            if name == "imported":
                engine.import_huggingface(folder)
            else:
                engine.load(checkpoint, optimizer=False)
            main, computing = _distances(engine, folder)
            found |= {name: main, f"{name} and rounded": computing}
            engine._optimizer.close()
    return found


def _distances(engine: MegatronEngine, folder: Path) -> tuple[float, float]:
    from megatron.core import parallel_state

    from rewarm.engine.megatron.weights import places, read_shard
    from rewarm.model.tensors import open_weights

    rank, sharded = parallel_state.get_tensor_model_parallel_rank(), engine._optimizer.sharded
    main, computing = [0.0], [0.0]
    with open_weights(folder, engine.architecture) as weights:
        for place, parameter in places(engine.chunks, engine.architecture):
            values = read_shard(weights, place, parameter, engine.architecture, rank).float()
            computing.append(float((parameter.detach().float() - values).abs().max()))
            if parameter in sharded.model_param_gbuf_map:
                span = sharded._get_model_param_range_map(parameter)["param"]
                mine = sharded._get_main_param_and_optimizer_states(parameter)["param"].detach()
                main.append(float((mine.float() - values.reshape(-1)[span.start : span.end]).abs().max()))
    return max(main), max(computing)


def damaged(folder: Path, broken: Path, settings: dict[str, Any], place: Path) -> list[str]:
    """Messages of what is refused with weights that are not finite: the import of a folder that has one, the load of a
    checkpoint, and the export of a model."""
    messages = []
    with _engine(folder, settings) as engine:
        messages.append(_refusal(lambda: engine.import_huggingface(broken)))
        messages.append(_refusal(lambda: _save_broken_and_load(engine, folder, place)))
        engine.import_huggingface(folder)
        _break(engine)
        messages.append(_refusal(lambda: engine.export_huggingface(place / "export", tokenizer=None)))
    return messages


def _save_broken_and_load(engine: MegatronEngine, folder: Path, place: Path) -> None:
    engine.import_huggingface(folder)
    _break(engine)
    if engine.rank == 0:
        (place / "checkpoint").mkdir()
    engine.barrier()
    engine.save(place / "checkpoint")
    engine.import_huggingface(folder)
    engine.load(place / "checkpoint")


def _break(engine: MegatronEngine) -> None:
    """One value of the last norm, on whichever rank has it."""
    for chunk in engine.chunks:
        for name, parameter in chunk.named_parameters():
            if name == "decoder.final_layernorm.weight":
                values = parameter.detach().float().clone()
                values[3] = float("nan")
                with torch.no_grad():
                    parameter.copy_(values)
                engine._optimizer.set_main(parameter, values)


def _refusal(attempt: Any) -> str:
    try:
        attempt()
    except UserError as error:
        return error.message
    return "nothing was wrong"

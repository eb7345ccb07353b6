"""What the ranks run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from ranks.tiny import DOMAINS, VOCAB_SIZE, global_batch, local_batch, tiny_config, tiny_engine
from rewarm.engine.base import StepResult
from rewarm.engine.build import build_engine
from rewarm.engine.megatron import engine as engine_module
from rewarm.engine.megatron.engine import MegatronEngine
from rewarm.engine.megatron.initialize import global_parameters
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture

LEARNING_RATE = 1e-3
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def train(settings: dict[str, Any], steps: int = 6, first: int = 0) -> list[StepResult]:
    """Train from random weights."""
    engine = tiny_engine(settings)
    results = [engine.train_step(local_batch(engine, first + step), LEARNING_RATE) for step in range(steps)]
    engine.close()
    return results


def train_without_reduction(settings: dict[str, Any], steps: int) -> list[StepResult]:
    """Train with the reduction of gradients over data-parallel ranks left out."""
    engine_module.finalize_model_grads = lambda chunks, *args, **kwargs: None
    return train(settings, steps)


def weights_after(settings: dict[str, Any], steps: int) -> dict[str, tuple[np.ndarray, int | None]]:
    """This rank's parameters by global name, with the axis they are split along; empty on copies of a model copy."""
    engine = tiny_engine(settings)
    assert isinstance(engine, MegatronEngine)
    for step in range(steps):
        engine.train_step(local_batch(engine, step), LEARNING_RATE)
    engine._gather_parameters()
    found: dict[str, tuple[np.ndarray, int | None]] = {}
    if engine.data_parallel_rank == 0:
        first = engine.rank % engine.layout.tensor == 0  # tensor ranks are neighbours
        for chunk in engine.chunks:
            for name, parameter in global_parameters(chunk):
                split = getattr(parameter, "tensor_model_parallel", False)
                if split or first:
                    found[name] = parameter.detach().float().numpy().copy(), parameter.partition_dim if split else None
    engine.close()
    return found


def measure(settings: dict[str, Any], micro_batch_size: int, windows: int) -> dict[str, Any]:
    """Held-out losses and next-token logits after one step."""
    engine = tiny_engine(settings)
    engine.train_step(local_batch(engine, 0), LEARNING_RATE)
    tokens = np.concatenate([global_batch(step).tokens for step in range(100, 103)])[:windows]
    measured = {
        "losses": engine.evaluate(tokens, micro_batch_size),
        "logits": engine.next_token_logits(tokens[0, :7]),
        "loss after": engine.train_step(local_batch(engine, 1), LEARNING_RATE).loss,
    }
    engine.close()
    return measured


def save_and_continue(settings: dict[str, Any], folder: Path, before: int, after: int) -> list[StepResult]:
    """Train, save, train on; what the later steps gave."""
    engine = tiny_engine(settings)
    for step in range(before):
        engine.train_step(local_batch(engine, step), LEARNING_RATE)
    engine.save(folder)
    results = [engine.train_step(local_batch(engine, before + step), LEARNING_RATE) for step in range(after)]
    engine.close()
    return results


def load_and_continue(
    settings: dict[str, Any], folder: Path, before: int, after: int, optimizer: bool = True
) -> list[StepResult]:
    """Load on a new engine and train on."""
    engine = tiny_engine(settings)
    engine.load(folder, optimizer=optimizer)
    results = [engine.train_step(local_batch(engine, before + step), LEARNING_RATE) for step in range(after)]
    engine.close()
    return results


def continue_parent(settings: dict[str, Any], folder: Path, before: int, after: int) -> list[StepResult]:
    """As :func:`load_and_continue` of a stage with a parent, whose weights are undefined before: not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    model = tiny_config(**settings).model
    assert model is not None
    config = tiny_config(**{**settings, "model": None, "parent": "elsewhere"})
    engine = build_engine(config, Architecture.from_config(model, VOCAB_SIZE), DOMAINS)
    engine.load(folder)
    return [engine.train_step(local_batch(engine, before + step), LEARNING_RATE) for step in range(after)]


def with_garbage_in_padding(settings: dict[str, Any], parent: Path, child: Path) -> dict[str, Any]:
    """Train and export with rows of padding as they are, and with large numbers in them, and give the weights of each
    to a child with another padding.

    Returns:
        For "zero" and "garbage", losses and gradient norms of both and the largest gradient of a row of padding; and
        whether the two exports, and the two of the children, hold the same bits in as many rows as the vocabulary.
    """
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for kind in ("zero", "garbage"):
        engine = _engine_with_padding(settings, kind == "garbage")
        results = [engine.train_step(local_batch(engine, step), LEARNING_RATE) for step in range(3)]
        gradients = [float(p.main_grad[rows].abs().max()) for p, rows in _padding(engine)]  # type: ignore[attr-defined]
        if engine.is_main:
            (parent / kind).mkdir()
        engine.barrier()
        engine.save(parent / kind)
        engine.export_huggingface(parent / f"{kind} exported", tokenizer=None)
        engine = _engine_with_padding({**settings, "megatron": {"vocab_divisor": 300}}, False)
        engine.load(parent / kind, optimizer=False)
        results.append(engine.train_step(local_batch(engine, 3), LEARNING_RATE))
        engine.export_huggingface(child / f"{kind} exported", tokenizer=None)
        found[kind] = [(result.loss, result.grad_norm) for result in results], max(gradients, default=0.0)
    for place in (parent, child):
        zero, garbage = (load_file(place / f"{kind} exported" / "model.safetensors") for kind in ("zero", "garbage"))
        rows = {len(zero[name]) for name in zero if "embed_tokens" in name or "lm_head" in name}
        found[place.name] = rows == {VOCAB_SIZE} and all(torch.equal(zero[name], garbage[name]) for name in zero)
    return found


def _engine_with_padding(settings: dict[str, Any], garbage: bool) -> MegatronEngine:
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    engine = tiny_engine(settings)
    assert isinstance(engine, MegatronEngine)
    with torch.no_grad():
        for parameter, rows in _padding(engine):
            parameter[rows] = 100.0 if garbage else 0.0
    engine._optimizer.sharded.reload_model_params()
    return engine


def _padding(engine: MegatronEngine) -> list[tuple[torch.nn.Parameter, slice]]:
    """This rank's vocabulary parameters with the rows that pad them, where there are any."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    parameters = [p for chunk in engine.chunks for name, p in chunk.named_parameters() if name in VOCABULARY]
    starts = [max(0, VOCAB_SIZE - rank * len(parameter)) for parameter in parameters]
    return [(p, slice(start, None)) for p, start in zip(parameters, starts, strict=True) if start < len(p)]


def optimizer_settings(settings: dict[str, Any], folder: Path) -> dict[str, set[Any]]:
    """What the parameter groups hold after a load."""
    engine = tiny_engine(settings)
    assert isinstance(engine, MegatronEngine)
    engine.load(folder)
    groups = engine._optimizer.sharded.param_groups
    return {name: {group[name] for group in groups} for name in ("weight_decay", "betas", "step")}


def fail_to_save(settings: dict[str, Any], folder: Path) -> tuple[int | None, float, float]:
    """Try to save where it must fail; the error's number, and the loss of one batch before and after."""
    engine = tiny_engine(settings)
    engine.train_step(local_batch(engine, 0), LEARNING_RATE)
    tokens = global_batch(1).tokens
    before = float(engine.evaluate(tokens, 2).sum())
    number = None
    try:
        engine.save(folder)
    except OSError as error:
        number = error.errno
    return number, before, float(engine.evaluate(tokens, 2).sum())


def fail_to_load(settings: dict[str, Any], folder: Path) -> str:
    """The message of a load that must be refused."""
    engine = tiny_engine(settings)
    try:
        engine.load(folder)
    except UserError as error:
        return str(error)
    return "loaded"


def identity() -> tuple[str, int]:
    """This rank's number and process."""
    return os.environ["RANK"], os.getpid()


def hang_on_rank_one(folder: Path) -> None:
    """Leave the process number behind; rank 1 never returns."""
    (folder / str(os.getpid())).touch()
    if os.environ["RANK"] == "1":
        time.sleep(3600)


def die_on_rank_one() -> None:
    """Rank 1 ends at once, rank 0 waits for it."""
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(3600)

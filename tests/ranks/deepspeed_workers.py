"""What the ranks of the deepspeed engine run; several configurations in one start, which is what takes time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ranks.deepspeed_models import LEARNING_RATE, deepspeed_config, masked_batch
from ranks.single_workers import group_timeouts
from ranks.tiny import DOMAINS, global_batch
from rewarm.engine.base import Batch, Engine, StepResult
from rewarm.engine.deepspeed.engine import DeepSpeedEngine
from rewarm.engine.state import MOMENTS, WEIGHT
from rewarm.errors import UserError
from rewarm.model.description import HuggingFaceModel


@contextmanager
def opened(folder: Path, settings: dict[str, Any], *, fill: bool = True) -> Iterator[DeepSpeedEngine]:
    """An engine that goes when the block ends and leaves the process group for the next one."""
    engine = DeepSpeedEngine(deepspeed_config(folder, **settings), HuggingFaceModel.from_folder(folder), DOMAINS)
    if fill:
        engine.import_huggingface(folder)
    yield engine
    engine.release()


def timeouts(folder: Path, cases: Sequence[dict[str, Any]]) -> list[float]:
    """The time limits of the groups of several engines."""
    found = []
    for settings in cases:
        with opened(folder, settings, fill=False):
            found += group_timeouts()
    return found


def share(engine: Engine, whole: Batch) -> Batch:
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


def weights(engine: Engine, scratch: Path) -> dict[str, np.ndarray]:
    """The model through an export, on every rank."""
    from safetensors.torch import load_file

    engine.export_huggingface(scratch, tokenizer=None, replace=True)
    engine.barrier()
    found = {name: tensor.numpy() for name, tensor in load_file(scratch / "model.safetensors").items()}
    engine.barrier()
    return found


def one_step(folder: Path, cases: Sequence[dict[str, Any]], scratch: Path) -> list[dict[str, np.ndarray]]:
    """The weights after one step of each configuration, at a learning rate of 1."""
    found = []
    for settings in cases:
        with opened(folder, settings) as engine:
            engine.train_step(share(engine, global_batch(0)), 1.0)
            found.append(weights(engine, scratch))
    return found


def save_all(folder: Path, cases: Sequence[dict[str, Any]], target: Path) -> list[list[StepResult]]:
    """Train each configuration for three steps, save it, and train on for three."""
    results = []
    for number, settings in enumerate(cases):
        with opened(folder, settings) as engine:
            results.append(_save(engine, target / str(number)))
    return results


def save_offloaded(
    folder: Path, cases: Sequence[dict[str, Any]], target: Path
) -> list[tuple[list[StepResult], dict[str, Any]]]:
    """:func:`save_all`, and what DeepSpeed really has where at the end of each configuration."""
    results = []
    for number, settings in enumerate(cases):
        with opened(folder, settings) as engine:
            results.append((_save(engine, target / str(number)), _places(engine)))
    return results


def _save(engine: DeepSpeedEngine, target: Path) -> list[StepResult]:
    steps(engine, 0, 3)
    if engine.is_main:
        target.mkdir()
    engine.barrier()
    engine.save(target)
    return steps(engine, 3, 3)


def _places(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Bytes in files by their kind, and what computes the update of which part."""
    files = [] if engine._swap is None else list(engine._swap.path.rglob("*.swp"))
    zero = engine.deepspeed.optimizer
    return {
        **{kind: sum(path.stat().st_size for path in files if kind in str(path)) for kind in ("optimizer", "params")},
        "update": type(zero.optimizer).__name__,
        "on_cpu": zero.partial_offload,
    }


def load_all(
    folder: Path, cases: Sequence[dict[str, Any]], saved: Sequence[Sequence[Path]]
) -> list[list[list[StepResult]]]:
    """Three more steps from each of some checkpoints, under every configuration."""
    results = []
    for settings, checkpoints in zip(cases, saved, strict=True):
        with opened(folder, settings, fill=False) as engine:
            found = []
            for checkpoint in checkpoints:
                engine.load(checkpoint)
                found.append(steps(engine, 3, 3))
            results.append(found)
    return results


def reset_all(folder: Path, cases: Sequence[dict[str, Any]], target: Path) -> list[dict[str, Any]]:
    """Train and save each configuration, and start a child from its weights: what of the two is equal."""
    found = []
    for number, settings in enumerate(cases):
        with opened(folder, settings) as engine:
            steps(engine, 0, 3)
            if engine.is_main:
                (target / str(number)).mkdir()
            engine.barrier()
            engine.save(target / str(number))
            parent = _main_state(engine)
        with opened(folder, settings, fill=False) as engine:
            engine.load(target / str(number), optimizer=False)
            child = _main_state(engine)
        pairs = [(parent[name], child[name]) for name in parent]
        found.append(
            {
                "main": all(torch.equal(a[WEIGHT], b[WEIGHT]) for a, b in pairs),
                "finer": sum(int((a[WEIGHT] != a[WEIGHT].bfloat16().float()).sum()) for a, _ in pairs),
                "moments": sum(float(b[kind].abs().sum()) for _, b in pairs for kind in MOMENTS),
            }
        )
    return found


def _main_state(engine: DeepSpeedEngine) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's fragments of the fp32 parameters and moments, by parameter."""
    fragments = engine._partitions.fragments(moments=True, write=False)
    return {part.name: {kind: value.clone() for kind, value in part.tensors.items()} for part in fragments}


def evaluate_all(folder: Path, cases: Sequence[dict[str, Any]], tokens: np.ndarray) -> list[dict[str, Any]]:
    """Held-out losses, logits and what a dry run and a bad gradient leave behind, for every configuration."""
    found = []
    for settings in cases:
        with opened(folder, settings) as engine:
            batch = share(engine, global_batch(0))
            before = engine.evaluate(tokens, 3)
            random = engine.rng_state()["cpu"].clone()
            engine.dry_run(batch)
            skipped = _step_on_a_bad_gradient(engine, batch)
            found.append(
                {
                    "losses": before,
                    "after": engine.evaluate(tokens, 3),
                    "random": torch.equal(random, engine.rng_state()["cpu"]),
                    "skipped": skipped,
                    "logits": engine.next_token_logits(tokens[0, :7]),
                    "parameters": engine.parameter_count(),
                    "first": steps(engine, 0, 1)[0],
                }
            )
    return found


def _step_on_a_bad_gradient(engine: DeepSpeedEngine, batch: Batch) -> StepResult:
    """A step whose gradient is infinite on one rank only."""
    handle = None
    if engine.rank == engine.world_size - 1:
        output = engine.deepspeed.module.get_output_embeddings()
        handle = output.register_forward_hook(lambda module, given, logits: logits * _Infinite.apply(logits))
    result = engine.train_step(batch, LEARNING_RATE)
    if handle is not None:
        handle.remove()
    return result


class _Infinite(torch.autograd.Function):
    """Ones whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradients[0], float("inf"))


def families(folders: Sequence[Path], settings: dict[str, Any], target: Path) -> list[np.ndarray]:
    """Import each model, train one step, export it; the logits of the engine."""
    logits = []
    for folder in folders:
        with opened(folder, settings) as engine:
            steps(engine, 0, 1)
            engine.export_huggingface(target / folder.name, tokenizer=None)
            logits.append(engine.next_token_logits(global_batch(9).tokens[0, :11]))
    return logits


def mixing_layer(folder: Path, settings: dict[str, Any]) -> str:
    """What a rehearsal says of a model that averages neighbouring positions between its layers."""
    with opened(folder, settings) as engine:

        def mix(module: torch.nn.Module, given: Any, hidden: torch.Tensor) -> torch.Tensor:
            before = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
            return (hidden + before) / 2

        handle = engine.deepspeed.module.model.embed_tokens.register_forward_hook(mix)
        try:
            engine.dry_run(share(engine, global_batch(0)))
        except UserError as error:
            return str(error)
        finally:
            handle.remove()
    return "nothing"


def state_without_gradient(
    folder: Path, cases: Sequence[dict[str, Any]], tokens: np.ndarray, target: Path
) -> list[dict[str, Any]]:
    """Of each configuration: losses after the import, and of a checkpoint after it; the export of the latter is
    written to ``target``, from a model that was trained for a step."""
    found = []
    for number, settings in enumerate(cases):
        place = target / str(number)
        with opened(folder, settings) as engine:
            imported = engine.evaluate(tokens, 2)
            if engine.rank == 0:
                (place / "checkpoint").mkdir(parents=True)
            engine.barrier()
            engine.save(place / "checkpoint", optimizer=False)
        with opened(folder, settings, fill=False) as engine:
            engine.load(place / "checkpoint", optimizer=False)
            loaded = engine.evaluate(tokens, 2)
            steps(engine, 0, 1)
            engine.export_huggingface(place / "export", tokenizer=None)
            found.append({"imported": imported, "loaded": loaded, "exported": engine.evaluate(tokens, 2)})
    return found


def portable_without_gradient(folder: Path, tokens: np.ndarray, place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Losses before and after the way through files that both engines read."""
    with opened(folder, {}) as engine:
        before = engine.evaluate(tokens, 2)
        engine.save_portable(place)
    with opened(folder, {}, fill=False) as engine:
        engine.load_portable(place)
        return before, engine.evaluate(tokens, 2)


def refusals(folder: Path, others: Sequence[Path], settings: dict[str, Any]) -> list[str]:
    """What an engine for one folder says to the import of others."""
    messages = []
    with opened(folder, settings, fill=False) as engine:
        for other in others:
            try:
                engine.import_huggingface(other)
                messages.append("nothing was wrong")
            except UserError as error:
                messages.append(error.message)
    return messages


def broken(folder: Path, settings: dict[str, Any], place: Path) -> list[str]:
    """What is said to the load and to the export of a model with a weight that is not finite."""
    messages = []
    with opened(folder, settings) as engine:
        with torch.no_grad():
            for fragment in engine._partitions.fragments(moments=False, write=True):
                if fragment.name == "model.norm.weight":
                    fragment.tensors[WEIGHT].fill_(float("nan"))
            engine._partitions.weights_changed()
        if engine.rank == 0:
            (place / "checkpoint").mkdir()
        engine.barrier()
        engine.save(place / "checkpoint", optimizer=False)
        for attempt in (
            lambda: engine.export_huggingface(place / "export", tokenizer=None),
            lambda: engine.load(place / "checkpoint", optimizer=False),
        ):
            try:
                attempt()
                messages.append("nothing was wrong")
            except UserError as error:
                messages.append(error.message)
    return messages

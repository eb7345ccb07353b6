"""What the ranks run to look at and change an engine's state."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ranks.deepspeed_models import LEARNING_RATE, deepspeed_config
from ranks.deepspeed_workers import share
from ranks.tiny import DOMAINS, global_batch
from rewarm.engine.base import Engine
from rewarm.engine.build import build_engine
from rewarm.engine.deepspeed.engine import DeepSpeedEngine
from rewarm.engine.megatron.engine import MegatronEngine
from rewarm.engine.megatron.state import described
from rewarm.engine.state import MOMENTS, WEIGHT, snapshot, squared_distance
from rewarm.model.description import describe

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "reptile.py"
EVERY, RATE, STEPS = 2, 0.3, 4


@contextmanager
def opened(folder: Path, settings: dict[str, Any]) -> Iterator[Engine]:
    """An engine with the folder's weights, which leaves the process group for the next one."""
    config = deepspeed_config(folder, **settings)
    engine = build_engine(config, describe(folder, config.engine), DOMAINS)
    engine.import_huggingface(folder)
    yield engine
    if isinstance(engine, DeepSpeedEngine):
        engine.release()
    else:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()


def retained(cases: Sequence[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Train with Reptile under each configuration: losses, the way from the start, and this rank's state."""
    spec = importlib.util.spec_from_file_location("reptile", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = []
    for folder, settings in cases:
        with opened(folder, settings) as engine:
            start = snapshot(engine)
            reptile = example.Reptile(engine, EVERY, RATE)
            losses, kept = [], True
            for step in range(STEPS):
                losses.append(engine.train_step(share(engine, global_batch(step)), LEARNING_RATE).loss)
                before = snapshot(engine, MOMENTS)
                reptile.after_step(step + 1)
                after = snapshot(engine, MOMENTS)
                kept &= all(torch.equal(value, after[key]) for key, value in before.items())
            found.append(
                {
                    "losses": losses,
                    "distance": squared_distance(engine, start),
                    "pieces": _pieces(engine),
                    "rounded": not isinstance(engine, MegatronEngine) or _rounded(engine),
                    "kept": kept,
                    "state": {key: value.numpy() for key, value in snapshot(engine, (WEIGHT, *MOMENTS)).items()},
                }
            )
    return found


def _pieces(engine: Engine) -> list[tuple[str, tuple[int, ...], Any, Any, slice]]:
    """Name, whole shape, indices, values and owned elements of this rank's parameters."""
    with engine.state() as tensors:
        return [
            (each.name, each.global_shape, each.indices().numpy(), each.tensor.numpy().copy(), each.owned)
            for each in tensors
        ]


def _rounded(engine: MegatronEngine) -> bool:
    """True if the model's own parameters are the rounded main parameters."""
    found = {each.name: each.parameter.detach().view(-1) for each in described(engine.chunks, engine.architecture)}
    with engine.state() as tensors:
        return all(
            torch.equal(
                found[each.name][each.start : each.start + len(each.tensor)], each.tensor.to(found[each.name].dtype)
            )
            for each in tensors
        )

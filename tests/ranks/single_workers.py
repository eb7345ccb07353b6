"""What the tests of the optimizer, the weights and the engine's manners run on their ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ranks.tiny import global_batch, local_batch, tiny_engine
from rewarm.engine.base import Batch
from rewarm.engine.megatron.engine import MegatronEngine
from rewarm.engine.megatron.initialize import global_parameters


def build(settings: dict[str, Any]) -> MegatronEngine:
    """An engine, as what it is."""
    engine = tiny_engine(settings)
    assert isinstance(engine, MegatronEngine)
    return engine


def group_timeouts() -> list[float]:
    """Minutes of every process group that this process is in."""
    import torch.distributed as dist

    cpu = torch.device("cpu")
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(cpu).options._timeout.total_seconds() / 60 for group in groups]


def timeouts(settings: dict[str, Any]) -> list[float]:
    """The time limits of the groups of an engine."""
    build(settings)
    return group_timeouts()


def default_timeout(settings: dict[str, Any], backend: str) -> float:
    """Minutes that torch gives a group which is made without a limit while an engine lives."""
    from torch.distributed.distributed_c10d import _get_default_timeout

    build(settings)
    return _get_default_timeout(backend).total_seconds() / 60


def parameters(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """Copies of this rank's parameters by global name."""
    return {name: value.detach().clone() for chunk in engine.chunks for name, value in global_parameters(chunk)}


def sgd_moves(limits: list[float]) -> list[tuple[float, float]]:
    """For each clipping limit: how far one step of plain descent at rate 1 goes, and the norm it reports."""
    found = []
    for limit in limits:
        engine = build({"optimizer": {"name": "sgd", "weight_decay": 0.0, "gradient_clipping": limit}})
        before = parameters(engine)
        norm = engine.train_step(local_batch(engine, 0), 1.0).grad_norm
        after = parameters(engine)
        found.append((float(sum((after[name] - before[name]).square().sum() for name in before).sqrt()), norm))
        engine.close()
    return found


def not_finite(settings: dict[str, Any]) -> dict[str, Any]:
    """Three steps, the second with a weight that makes gradients overflow."""
    engine = build(settings)
    skipped = [engine.train_step(local_batch(engine, 0), 1e-3).skipped]
    before = parameters(engine)
    norm = engine.chunks[0].decoder.final_layernorm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("nan"))
    skipped.append(engine.train_step(local_batch(engine, 1), 1e-3).skipped)
    with torch.no_grad():
        norm.copy_(kept)
    after = parameters(engine)
    skipped.append(engine.train_step(local_batch(engine, 2), 1e-3).skipped)
    return {
        "skipped": skipped,
        "weights unchanged by the skipped step": all(torch.equal(before[name], after[name]) for name in before),
        "step count": engine._optimizer.sharded.param_groups[0]["step"],
    }


def decay_by_name(settings: dict[str, Any]) -> dict[str, float]:
    """The weight decay of every parameter."""
    engine = build({**settings, "optimizer": {"weight_decay": 0.5}})
    names = {id(parameter): name for chunk in engine.chunks for name, parameter in global_parameters(chunk)}
    sharded = engine._optimizer.sharded
    groups = zip(sharded.param_groups, sharded.model_fp32_groups, strict=True)
    return {names[id(parameter)]: group["weight_decay"] for group, members in groups for parameter in members}


def masked_step(settings: dict[str, Any]) -> tuple[float, float, np.ndarray]:
    """A step in which only every third target counts."""
    engine = build(settings)
    batch = local_batch(engine, 0)
    mask = np.zeros((len(batch.tokens), batch.tokens.shape[1] - 1), dtype=bool)
    mask[:, ::3] = True
    result = engine.train_step(Batch(batch.tokens, batch.domains, mask), 1e-3)
    engine.close()
    return result.loss, result.grad_norm, result.token_counts


def evaluated_by(sizes: list[int]) -> list[np.ndarray]:
    """Token losses of the same windows by micro-batches of several sizes."""
    engine = build({})
    tokens = np.concatenate([global_batch(step).tokens for step in range(2)])[:13]
    return [engine.evaluate(tokens, size) for size in sizes]


def unmasked_losses() -> tuple[np.ndarray, np.ndarray]:
    """Token losses [B, S] before any step, from the logits of every prefix; and the engine's sums."""
    engine = build({})
    tokens = global_batch(0).tokens[:2]
    losses = np.zeros((2, tokens.shape[1] - 1))
    for row, window in enumerate(tokens):
        for last in range(1, len(window)):
            logits = engine.next_token_logits(window[:last]).astype(np.float64)
            losses[row, last - 1] = np.log(np.exp(logits).sum()) - logits[window[last]]
    sums = engine.evaluate(tokens, 2)
    engine.close()
    return losses, sums


def initial_weights(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """This rank's weights before any step."""
    engine = build(settings)
    found = {name: value.numpy() for name, value in parameters(engine).items()}
    engine.close()
    return found


def dry_run(settings: dict[str, Any]) -> tuple[bool, bool, float, float]:
    """Whether a dry run leaves weights and random state alone, and the next step with and without it."""
    losses = []
    same: list[bool] = []
    for rehearse in (True, False):
        engine = build(settings)
        if rehearse:
            weights, state = parameters(engine), torch.get_rng_state()
            engine.dry_run(local_batch(engine, 0))
            after = parameters(engine)
            same = [
                all(torch.equal(weights[name], after[name]) for name in weights),
                bool(torch.equal(state, torch.get_rng_state())),
            ]
        engine.train_step(local_batch(engine, 0), 1e-3)
        losses.append(engine.train_step(local_batch(engine, 1), 1e-3).loss)
        engine.close()
    return same[0], same[1], losses[0], losses[1]


def messages(settings: dict[str, Any]) -> dict[str, Any]:
    """What the collectives of the engine give."""
    engine = build(settings)
    return {
        "gather": engine.gather({"rank": engine.rank}),
        "broadcast": engine.broadcast(f"from {engine.rank}"),
        "any": (engine.any_rank(engine.rank == 1), engine.any_rank(False)),
    }

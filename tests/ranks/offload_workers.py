"""What the ranks run to hold offloaded against plain updates."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from ranks.tiny import local_batch, tiny_engine
from rewarm.engine import placement as placing
from rewarm.engine.base import StepResult
from rewarm.engine.megatron.engine import MegatronEngine
from rewarm.errors import UserError
from rewarm.offload.planning.placement import interleave
from rewarm.offload.planning.routes import Placement, Route
from rewarm.offload.runtime.device import open_device
from rewarm.offload.runtime.profile import Profile, describe

LEARNING_RATE = 3e-3
STEPS = 50
STATE = ("param", "exp_avg", "exp_avg_sq")


def build(settings: dict[str, Any]) -> MegatronEngine:
    """An engine on this rank, whichever was there before."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    engine = tiny_engine(settings)
    assert isinstance(engine, MegatronEngine)
    return engine


def train(engine: MegatronEngine, first: int, last: int) -> list[StepResult]:
    """Some steps, with a rate that moves."""
    return [
        engine.train_step(local_batch(engine, step), LEARNING_RATE / (1 + step / 50)) for step in range(first, last)
    ]


def state_of(engine: MegatronEngine) -> list[torch.Tensor]:
    """The model's parameters, and main parameters and moments of this rank's shards."""
    engine._gather_parameters()
    found = [parameter.detach().clone() for chunk in engine.chunks for parameter in chunk.parameters()]
    sharded = engine._optimizer.sharded
    for parameter in sharded.model_param_gbuf_map:
        tensors = sharded._get_main_param_and_optimizer_states(parameter)
        found += [tensors[name].detach().clone() for name in STATE]
    return found


def mixtures(count: int, half: bool) -> list[Placement]:
    """Every route alone and together."""
    share = max(1, count // 5)
    moving = (Route.STREAMED, Route.NVME_CPU, Route.NVME_STREAMED)
    every = interleave({Route.RESIDENT: share, Route.CPU: count - 4 * share, **dict.fromkeys(moving, share)})
    stride = tuple(Route.STREAMED if i % 2 else Route.CPU for i in range(count))
    twin = (Route.RESIDENT,) * share + (Route.CPU,) * (count - share)
    return [
        Placement((Route.STREAMED,) * count, name="k=1", slots=2, split=half),
        Placement(stride, name="k=2"),
        Placement(twin, name="twinflow"),
        Placement((Route.NVME_CPU,) * count, name="nvme to cpu", host_slots=2),
        Placement((Route.NVME_STREAMED,) * count, name="nvme to device", slots=1, host_slots=1, split=half),
        Placement((Route.RESIDENT,) * count, name="resident"),
        Placement(every, name="all five", split=half),
    ]


def compare(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fifty steps with mode none, and fifty that change the placement every seven: what is equal and was covered."""
    engine = build(settings)
    expected = train(engine, 0, STEPS)
    wanted = state_of(engine)
    size = 7 * 2048 if engine.config.optimizer.eight_bit else 8192
    paths = {"mode": "nvme", "subgroup_size": size, "nvme_paths": [str(folder)]}
    engine = build({**settings, "offload": paths})
    inner = engine._optimizer._inner.offload.inner
    layout = inner.layout
    results = train(engine, 0, 1)
    split = settings.get("precision") == "bfloat16" and not engine.config.optimizer.eight_bit
    for i, placement in enumerate(mixtures(layout.subgroups, split)):
        inner.place(placement)
        results += train(engine, 1 + 7 * i, 8 + 7 * i)
    assert len(results) == STEPS
    found = state_of(engine)
    outcome = {
        "losses": [a.loss_sums.tobytes() == b.loss_sums.tobytes() for a, b in zip(results, expected, strict=True)],
        "norms": [a.grad_norm == b.grad_norm for a, b in zip(results, expected, strict=True)],
        "state": [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)],
        "clipped": sum(a.grad_norm > 0.5 for a in expected),
        "groups": len({group for shard in layout.shards for group in [shard.group]}),
        "trailing": layout.numel % layout.subgroup_size,
        "subgroups": layout.subgroups,
        "learned": expected[0].loss - expected[-1].loss,
    }
    inner.close()
    return outcome


def save(settings: dict[str, Any], folder: Path, before: int, after: int) -> list[bytes]:
    """Train, save, train on; the loss sums of the later steps."""
    engine = build(settings)
    train(engine, 0, before)
    engine.save(folder)
    return [result.loss_sums.tobytes() for result in train(engine, before, before + after)]


def load(settings: dict[str, Any], folder: Path, before: int, after: int, optimizer: bool = True) -> list[bytes]:
    """Load and train on."""
    engine = build(settings)
    engine.load(folder, optimizer=optimizer)
    return [result.loss_sums.tobytes() for result in train(engine, before, before + after)]


def main_parameters(engine: MegatronEngine) -> list[torch.Tensor]:
    """This rank's shards of the fp32 main parameters, flat."""
    sharded = engine._optimizer.sharded
    states = [sharded._get_main_param_and_optimizer_states(p) for p in sharded.model_param_gbuf_map]
    return [state["param"].detach().float().flatten().clone() for state in states]


def reset(parent: dict[str, Any], child: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train and save a parent, and start a child from its weights: what of the two is equal."""
    engine = build(parent)
    train(engine, 0, 3)
    if engine.rank == 0:
        folder.mkdir()
    engine.barrier()
    engine.save(folder)
    wanted, weights = main_parameters(engine), [p.detach().clone() for c in engine.chunks for p in c.parameters()]
    engine._optimizer.close()
    engine = build(child)
    engine.load(folder, optimizer=False)
    found = state_of(engine)
    copies = [p.detach() for chunk in engine.chunks for p in chunk.parameters()]
    kept = found[len(copies) :]
    return {
        "main": all(torch.equal(a, b) for a, b in zip(main_parameters(engine), wanted, strict=True)),
        "finer": sum(int((a != a.bfloat16().float()).sum()) for a in wanted),
        "weights": all(torch.equal(a.bfloat16(), b.bfloat16()) for a, b in zip(weights, copies, strict=True)),
        "moments": sum(float(moment.abs().sum()) for i in (1, 2) for moment in kept[i :: len(STATE)]),
        "step": engine._optimizer.num_updates,
    }


def main_parameters_of(settings: dict[str, Any], folder: Path) -> bool:
    """Whether a start without the moments has the main parameters of a resume, on one layout."""
    found = []
    for optimizer in (True, False):
        engine = build(settings)
        engine.load(folder, optimizer=optimizer)
        found.append(main_parameters(engine))
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def refusals(cases: list[dict[str, Any]]) -> list[str]:
    """The message with which each engine is not built, or "built"."""
    found = []
    for settings in cases:
        try:
            build(settings)._optimizer.close()
            found.append("built")
        except UserError as error:
            found.append(str(error))
    return found


def without_space(settings: dict[str, Any]) -> str:
    """:func:`refusals` on a machine whose drives are nearly full."""
    placing.free_space = lambda paths: 4096.0
    return refusals([settings])[0]


def write_profile(path: Path, link: float | None, cpu_rate: float, name: str = "") -> None:
    """The profile of this machine, or of one of another name, with rates that nobody measured."""
    device = open_device(link, required=False)
    fingerprint, description = describe(device, 1)
    rates = {str(size): cpu_rate for size in (1 << 20, 1 << 24)}
    Profile(
        fingerprint + name, description, 1e9, 1e9, 2e9, 1e11, rates, cpu_rate, rates, 0.0, 1e12, {}, 1.0
    ).save(path)  # fmt: skip


def auto(settings: dict[str, Any], profile: Path, cpu_rate: float, device_memory: float | None) -> dict[str, Any]:
    """Forty-five steps plain and under mode auto by a given profile; where the state was at the beginning and end."""
    expected = train(build(settings), 0, 45)
    if os.environ["RANK"] == "0":
        write_profile(profile, None, cpu_rate)
    section = {"mode": "auto", "subgroup_size": 8192, "cpu_threads": 1, "profile": str(profile)}
    engine = build({**settings, "offload": {**section, "device_memory": device_memory}})
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("rewarm").addHandler(handler)
    logging.getLogger("rewarm").setLevel(logging.INFO)
    inner = engine._optimizer._inner.offload.inner
    places = [inner.placement.describe()]
    engine.dry_run(local_batch(engine, 0))
    places.append(inner.placement.describe())
    placer = engine._optimizer._inner.offload.placer
    job, beside = placer.job, placer._step_seconds
    results = train(engine, 0, 45)
    places.append(inner.placement.describe())
    equal = [a.loss_sums.tobytes() == b.loss_sums.tobytes() for a, b in zip(results, expected, strict=True)]
    engine._optimizer.close()
    hidden = {"passes": job.micro_batches, "forward": job.forward, "of the step": job.hidden / beside}
    return {"equal": equal, "places": places, "messages": messages, "hidden": hidden}

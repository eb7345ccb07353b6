"""What the ranks run to hold updates that overlap backward and forward passes against plain ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ranks.offload_workers import build, state_of, train
from ranks.tiny import global_batch, local_batch
from rewarm.engine.megatron import engine as engine_module
from rewarm.engine.megatron import overlap
from rewarm.engine.megatron.engine import MegatronEngine
from rewarm.offload.planning.simulate import Timeline, check
from rewarm.offload.runtime.optimizer import OffloadedAdamW

STEPS = 12
COMPUTE = ("backward", "barrier", "forward")


def inner_of(engine: MegatronEngine) -> OffloadedAdamW:
    """This rank's offloaded state."""
    inner = engine._optimizer._inner.offload.inner
    assert isinstance(inner, OffloadedAdamW)
    return inner


def rows(timeline: Timeline, kind: str) -> dict[int, tuple[float, float]]:
    """Start and end of a kind of task by subgroup."""
    found = zip(timeline.tasks, timeline.start, timeline.end, strict=True)
    return {task.subgroup: (start, end) for task, start, end in found if task.kind == kind}


def train_timed(engine: MegatronEngine) -> tuple[list[bytes], list[Timeline]]:
    """Loss sums of some steps, and when the tasks of each ran, but for the last."""
    sums, timelines = [], []
    for step in range(STEPS):
        sums += [result.loss_sums.tobytes() for result in train(engine, step, step + 1)]
        if (timeline := inner_of(engine).timeline) is not None:
            check(timeline, inner_of(engine).layout.subgroups)
            timelines.append(timeline)
    return sums, timelines


def beside_compute(settings: dict[str, Any], modes: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Train under each offload section; in how many steps the losses are those of the plain run, and what overlapped.

    Forward: the next pass had begun before the last update or upload. Backward: a gradient was copied or state fetched
    before the last gradient was there.
    """
    engine = build(settings)
    expected = [result.loss_sums.tobytes() for result in train(engine, 0, STEPS)]
    wanted, outcome = state_of(engine), {}
    for name, section in modes.items():
        engine = build({**settings, "offload": section})
        found, timelines = train_timed(engine)
        before_last = beside_backward = 0
        for timeline in timelines:
            updates, last_gradient = rows(timeline, "update"), max(rows(timeline, "backward").values())[0]
            uploads = rows(timeline, "upload")
            last = max(start for start, _ in (*updates.values(), *uploads.values()))
            before_last += min(end for _, end in rows(timeline, "forward").values()) < last
            early = [*rows(timeline, "gradient").values(), *rows(timeline, "fetch").values()]
            beside_backward += min(start for start, _ in early) < last_gradient
        state = state_of(engine)
        outcome[name] = {
            "equal": sum(a == b for a, b in zip(found, expected, strict=True)),
            "state": all(torch.equal(a, b) for a, b in zip(state, wanted, strict=True)),
            "timelines": len(timelines),
            "forward": before_last,
            "backward": beside_backward,
        }
        engine._optimizer.close()
    return outcome


def without_gate(settings: dict[str, Any], section: dict[str, Any]) -> int:
    """Steps whose losses are those of the plain run when no forward pass waits for its parameters."""
    expected = [result.loss_sums.tobytes() for result in train(build(settings), 0, STEPS)]
    overlap.Overlap._wait = lambda *unused: None  # type: ignore[method-assign]
    engine = build({**settings, "offload": section})
    found = []
    try:
        for step in range(STEPS):
            found += [result.loss_sums.tobytes() for result in train(engine, step, step + 1)]
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # autograd may come upon it first
    engine._optimizer.close()
    return sum(a == b for a, b in zip(found, expected, strict=False))


def gradient_copies(settings: dict[str, Any], section: dict[str, Any], finalized: bool = True) -> dict[str, int]:
    """Hold every copy of a gradient against the buffer from which the norm was taken.

    Args:
        settings, section: of an engine whose state is updated by the CPU.
        finalized: False takes every gradient for final that its data-parallel group has reduced.
    """
    small_buckets()
    if not finalized:
        overlap._finalized = lambda *unused: False  # type: ignore[assignment]
    engine = build({**settings, "offload": section})
    inner = inner_of(engine)
    counts = {"copies": 0, "wrong": 0, "early": 0}
    release = inner.release

    def release_and_compare(grad_scale: float) -> None:
        executor = inner._executor
        assert executor is not None and executor.step is not None
        counts["early"] += sum(
            executor.step.done[i].is_set() for i, task in enumerate(executor.tasks) if task.kind == "gradient"
        )
        wanted = [gradient.clone() for gradient in inner._given or ()]
        release(grad_scale)
        executor.wait_gradients()
        for subgroup, cuts in enumerate(inner._cuts):
            copy = inner.states.host_gradient(subgroup)
            for cut in cuts:
                piece = wanted[cut.shard][cut.offset : cut.offset + cut.stop - cut.start]
                counts["copies"] += 1
                counts["wrong"] += not torch.equal(copy[cut.start : cut.stop], piece)

    inner.release = release_and_compare  # type: ignore[method-assign]
    train(engine, 0, 4)
    engine._optimizer.close()
    return counts


def small_buckets() -> None:
    """Several buckets even for a small model."""
    settings = engine_module.DistributedDataParallelConfig
    engine_module.DistributedDataParallelConfig = partial(settings, bucket_size=30000)


def eventful(settings: dict[str, Any], section: dict[str, Any], folder: Path) -> dict[str, bool]:
    """Whatever looks at the parameters or the state comes right after a step; what is equal to the plain run."""
    small_buckets()
    found = {}
    for name, offload in (("plain", {}), ("offloaded", section)):
        engine = build({**settings, "offload": offload})
        seen: dict[str, Any] = {"first": losses(engine, 0, 4)}
        seen["evaluated"] = engine.evaluate(global_batch(100).tokens, 2).tobytes()
        seen["second"] = losses(engine, 4, 6)
        if engine.rank == 0:
            (folder / name).mkdir()
        engine.barrier()
        engine.save(folder / name)
        poisoned = local_batch(engine, 6)
        weights = np.full(len(poisoned.tokens), np.nan)
        seen["skipped"] = engine.train_step(replace(poisoned, loss_weights=weights), 1e-3).skipped
        seen["third"] = losses(engine, 7, 9)
        seen["logits"] = engine.next_token_logits(global_batch(100).tokens[0, :7]).tobytes()
        seen["fourth"] = losses(engine, 9, 10)
        tokens = global_batch(101).tokens
        seen["gradients"] = engine.domain_gradients([tokens[:4], tokens[4:]], 2).products.tobytes()
        seen["fifth"] = losses(engine, 10, 13)
        seen["state"] = [tensor.numpy().tobytes() for tensor in map(torch.Tensor.float, state_of(engine))]
        engine._optimizer.close()
        found[name] = seen
    equal = {key: value == found["offloaded"][key] for key, value in found["plain"].items()}
    resumed = build(settings)
    resumed.load(folder / "offloaded")
    equal["resumed"] = losses(resumed, 6, 8) == resumed_plain(settings, folder / "plain")
    return equal | {"was skipped": found["plain"]["skipped"]}


def losses(engine: MegatronEngine, first: int, last: int) -> list[tuple[bytes, float]]:
    """Loss sums and norms of some steps."""
    return [(result.loss_sums.tobytes(), result.grad_norm) for result in train(engine, first, last)]


def resumed_plain(settings: dict[str, Any], folder: Path) -> list[tuple[bytes, float]]:
    """What a plain run does after a checkpoint of a plain run."""
    engine = build(settings)
    engine.load(folder)
    return losses(engine, 6, 8)


def failing_link(settings: dict[str, Any], section: dict[str, Any], folder: Path) -> dict[str, str]:
    """The link breaks while an update runs on after its step has returned: what each call says then."""
    engine = build({**settings, "offload": section})
    train(engine, 0, 2)
    inner, messages = inner_of(engine), {}
    copy, release = inner._device.copy, inner.release

    def broken(target: torch.Tensor, source: torch.Tensor, direction: str) -> None:
        if direction == "h2d":
            raise OSError("the link is down")
        copy(target, source, direction)

    def release_and_break(grad_scale: float) -> None:
        inner._device.copy = broken  # type: ignore[method-assign,assignment]
        release(grad_scale)

    inner.release = release_and_break  # type: ignore[method-assign]
    train(engine, 2, 3)
    for name, call in {
        "next step": lambda: train(engine, 3, 4),
        "save": lambda: engine.save(folder),
        "evaluate": lambda: engine.evaluate(global_batch(0).tokens, 2),
        "step after": lambda: train(engine, 4, 5),
    }.items():
        try:
            call()
            messages[name] = "nothing"
        except OSError as error:
            messages[name] = str(error)
    engine._optimizer.close()
    return messages


def interrupted(settings: dict[str, Any], section: dict[str, Any]) -> list[bool]:
    """A backward pass ends in an error near its end, and the step is tried again: losses equal to the plain run's."""
    expected = losses(build(settings), 0, 6)
    engine = build({**settings, "offload": section})
    found = losses(engine, 0, 3)
    inner, seen = inner_of(engine), []

    def fail(gradient: torch.Tensor) -> None:
        if inner.begun:  # in the last micro-batch
            seen.append(True)
            raise RuntimeError("out of memory")

    first = engine.chunks[0].embedding.word_embeddings.weight
    handle = first.register_hook(fail)
    try:
        train(engine, 3, 4)
    except RuntimeError as error:
        assert "out of memory" in str(error)
    handle.remove()
    found += losses(engine, 3, 6)
    engine._optimizer.close()
    return [*(a == b for a, b in zip(found, expected, strict=True)), bool(seen)]

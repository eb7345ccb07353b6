"""What the ranks run to hold offloaded against plain updates under DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ranks.deepspeed_workers import opened, share, steps
from ranks.offload_workers import mixtures
from ranks.tiny import global_batch
from rewarm.engine.deepspeed.engine import DeepSpeedEngine

Outcome = dict[str, Any]


def state_of(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """Copies of this rank's fp32 parameters and moments."""
    fragments = engine._partitions.fragments(moments=True, write=False)
    return [tensor.clone() for fragment in fragments for tensor in fragment.tensors.values()]


def compare(folder: Path, cases: Sequence[tuple[dict[str, Any], int]], drive: Path) -> list[Outcome]:
    """Every case plain, and under seven placements for some steps each; what is equal."""
    found = []
    section = {"mode": "nvme", "nvme_paths": [str(drive)], "subgroup_size": 8192}
    for settings, each in cases:
        total = 7 * each + 1
        with opened(folder, settings) as engine:
            expected, wanted = steps(engine, 0, total), state_of(engine)
        with opened(folder, {**settings, "offload": section}) as engine:
            inner = engine._partitions.inner.offload.inner
            results = steps(engine, 0, 1)
            for i, placement in enumerate(mixtures(inner.layout.subgroups, False)):
                inner.place(placement)
                results += steps(engine, 1 + each * i, each)
            state = state_of(engine)
        equal = [a.loss_sums.tobytes() == b.loss_sums.tobytes() for a, b in zip(results, expected, strict=True)]
        found.append(
            {
                "losses": equal,
                "norms": [a.grad_norm == b.grad_norm for a, b in zip(results, expected, strict=True)],
                "state": [torch.equal(a, b) for a, b in zip(state, wanted, strict=True)],
                "subgroups": inner.layout.subgroups,
                "clipped": sum(a.grad_norm > 0.5 for a in expected),
            }
        )
    return found


def resume(folder: Path, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], target: Path) -> list[bool]:
    """Three steps, a checkpoint, three more; equal to the last three from the checkpoint under other settings?"""
    found = []
    for number, (before, after) in enumerate(pairs):
        with opened(folder, before) as engine:
            steps(engine, 0, 3)
            engine.save(target / str(number))
            expected = [result.loss_sums.tobytes() for result in steps(engine, 3, 3)]
        with opened(folder, after, fill=False) as engine:
            engine.load(target / str(number))
            engine.dry_run(share(engine, global_batch(0)))
            found.append(expected == [result.loss_sums.tobytes() for result in steps(engine, 3, 3)])
    return found

"""Offloaded runs under Megatron have the bits of plain ones, on every layout, whatever the placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import offload_workers
from ranks.harness import run_ranks

TIED = {"model": {"tie_embeddings": True, "num_layers": 2}, "batch": {"micro_batch_size": 2}}
HALF = {**TIED, "model": {"num_layers": 2}, "precision": "bfloat16"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 1, tied": (1, TIED),
    "data 1, bfloat16": (1, HALF),
    "data 2, bfloat16": (2, HALF),
    "tensor 2, pipeline 2, tied": (4, {**TIED, "parallel": {"tensor": 2, "pipeline": 2}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_steps_have_the_bits_of_the_plain_run(layout: str, disk: Path) -> None:
    num_ranks, settings = LAYOUTS[layout]
    for outcome in run_ranks(offload_workers.compare, num_ranks, settings, disk):
        assert all(outcome["losses"]) and all(outcome["norms"]) and all(outcome["state"]), outcome
        assert 10 < outcome["clipped"] and outcome["groups"] == 2
        assert outcome["subgroups"] >= 5 and outcome["trailing"], outcome
        assert outcome["learned"] > 0.5

"""Offloaded runs under DeepSpeed have the bits of plain ones at every ZeRO stage, whatever the placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import deepspeed_offload_workers as workers
from ranks.deepspeed_models import write_model
from ranks.harness import run_ranks

CLIP: dict[str, Any] = {"optimizer": {"gradient_clipping": 0.5}, "batch": {"micro_batch_size": 2}}
STAGES: dict[str, dict[str, Any]] = {f"stage {stage}": {"deepspeed": {"zero_stage": stage}} for stage in range(4)}
STAGES["stage 3, sub-groups"] = {"deepspeed": {"zero_stage": 3, "sub_group_size": 20000, "persistence_threshold": 0}}
HALF = {"precision": "bfloat16"}
CASES = {name: {**CLIP, **stage} for name, stage in STAGES.items()} | {
    f"{name}, bfloat16": {**CLIP, **HALF, **STAGES[name]} for name in ("stage 1", "stage 2", "stage 3")
}
EIGHT_BIT = {"optimizer": {"gradient_clipping": 0.5, "name": "adamw_8bit"}}
CASES |= {f"{name}, 8 bits": {**CASES[name], **EIGHT_BIT} for name in ("stage 0", "stage 3, sub-groups")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("model"))


def test_every_stage_has_the_bits_of_the_plain_run(folder: Path, disk: Path) -> None:
    """Fifty steps at stage 2 in bfloat16, eight with 8-bit moments, fifteen elsewhere."""
    each = {name: 7 if name == "stage 2, bfloat16" else 1 if "8 bits" in name else 2 for name in CASES}
    cases = [(settings, each[name]) for name, settings in CASES.items()]
    for outcomes in run_ranks(workers.compare, 2, folder, cases, disk):
        for name, outcome in zip(CASES, outcomes, strict=True):
            assert all(outcome["losses"]) and all(outcome["norms"]) and all(outcome["state"]), (name, outcome)
            assert outcome["subgroups"] >= 5 and outcome["clipped"] > 3, (name, outcome)


def test_a_checkpoint_is_that_of_the_plain_optimizer(folder: Path, tmp_path: Path) -> None:
    plain = CASES["stage 3, bfloat16"]
    offloaded = {**plain, "offload": {"mode": "twinflow", "subgroup_size": 8192}}
    pairs = [(plain, offloaded), (offloaded, plain)]
    # Moments of 8 bits are in it without loss.
    eight = [{**CASES[name], **EIGHT_BIT} for name in ("stage 2, bfloat16", "stage 3, sub-groups")]
    pairs += [(case, {**case, "offload": offloaded["offload"]}) for case in eight]
    for number in range(len(pairs)):
        (tmp_path / str(number)).mkdir()
    assert run_ranks(workers.resume, 2, folder, pairs, tmp_path) == [[True] * len(pairs)] * 2

"""What needs DeepSpeed's compiled extensions: TwinFlow and NVMe follow plain torch, and so do their checkpoints.

The extensions take minutes to compile, so the tests run where that has been done:
``python scripts/deepspeed_extensions.py``, with EXTENSIONS naming the same folder for both if it is not the usual one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ranks import deepspeed_workers as workers
from ranks.deepspeed_models import deepspeed_config, plain_steps, write_model
from ranks.harness import run_ranks
from rewarm.config.deepspeed import DeepSpeedConfig
from rewarm.engine.deepspeed.extensions import is_built

PLACE = {"extensions_folder": os.environ.get("EXTENSIONS")}
STAGE3: dict[str, Any] = {**PLACE, "zero_stage": 3, "sub_group_size": 5000, "persistence_threshold": 0}


def settings(case: str, nvme: Path) -> dict[str, Any]:
    on_nvme = {"offload_optimizer": "nvme", "nvme_path": str(nvme)}
    kinds: dict[str, dict[str, Any]] = {
        "TwinFlow": {"offload_optimizer": "cpu", "offload_ratio": 0.5},
        "optimizer on NVMe": on_nvme,
        "optimizer and parameters on NVMe": {**on_nvme, "offload_parameters": "nvme"},
        "neither": dict.fromkeys(PLACE),
    }
    return {"deepspeed": {**STAGE3, **kinds[case]}}


def need(extension: str) -> None:
    twin_flow = DeepSpeedConfig.model_validate({**STAGE3, "offload_optimizer": "cpu", "offload_ratio": 0.5})
    if not is_built(extension, twin_flow):
        pytest.skip(f"{extension} is not compiled here: python scripts/deepspeed_extensions.py {extension}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSpeed moves a rank's part of a parameter if it takes a MiB: here those of the three matrices of the MLP."""
    folder = tmp_path_factory.mktemp("model")
    return write_model("llama", folder, hidden_size=256, intermediate_size=2048, num_hidden_layers=1)


MATRIX = 1 << 20
"""Bytes of a rank's share of one of them in fp32."""


def follow(model: Path, nvme: Path, cases: list[str]) -> list[dict[str, Any]]:
    """Train each case, save it after three steps, go on for three, and load it under the others and without offload.

    Returns:
        What each case really had where, on the first rank.
    """
    plain = [(loss, norm) for loss, norm, _ in plain_steps(model, deepspeed_config(model), 6)]
    target = nvme / "saved"
    target.mkdir()
    chosen = [settings(case, nvme) for case in cases]
    results = run_ranks(workers.save_offloaded, 2, model, chosen, target)[0]
    saved = [steps for steps, _ in results]
    for case, steps in zip(cases, saved, strict=True):
        for ours, (loss, norm) in zip(steps, plain[3:], strict=True):
            assert ours.loss == pytest.approx(loss, abs=1e-6), case
            assert ours.grad_norm == pytest.approx(norm, rel=1e-6), case
    paths = [target / str(number) for number in range(len(cases))]
    other = [*chosen, settings("neither", nvme)]
    loaded = run_ranks(workers.load_all, 2, model, other, [paths] * len(other))[0]
    for name, found in zip([*cases, "neither"], loaded, strict=True):
        for case, went_on, steps in zip(cases, saved, found, strict=True):
            for ours, theirs in zip(steps, went_on, strict=True):
                assert ours.loss == pytest.approx(theirs.loss, abs=1e-6), (case, name)
                assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6), (case, name)
    assert not list(nvme.glob("rewarm-*")), "files were left on the disk"
    return [places for _, places in results]


def test_twin_flow(model: Path, tmp_path: Path) -> None:
    need("cpu_adam")
    places = follow(model, tmp_path, ["TwinFlow", "neither"])[0]
    assert (places["update"], places["on_cpu"]) == ("DeepSpeedCPUAdam", 0.5)


def test_nvme(model: Path, tmp_path: Path) -> None:
    need("async_io")
    optimizer, both, neither = follow(
        model, tmp_path, ["optimizer on NVMe", "optimizer and parameters on NVMe", "neither"]
    )
    arrays = 4 * 3 * MATRIX  # master, moments and gradient
    assert (optimizer["optimizer"], optimizer["params"]) == (arrays, 0)
    assert (both["optimizer"], both["params"]) == (arrays, 3 * MATRIX)
    assert (neither["optimizer"], neither["params"]) == (0, 0)

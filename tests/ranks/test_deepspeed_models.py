"""Models of several families, evaluation, rehearsal and bad gradients under the deepspeed engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ranks import deepspeed_workers as workers
from ranks.deepspeed_models import FAMILIES, LEARNING_RATE, deepspeed_config, plain_steps, write_model
from ranks.harness import run_ranks
from ranks.tiny import global_batch
from rewarm.model.reference import window_losses


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {family: write_model(family, place / family) for family in FAMILIES}


def test_exports_of_five_families_load_in_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = {"deepspeed": {"zero_stage": 3}}
    logits = run_ranks(workers.families, 2, list(folders.values()), settings, tmp_path)[0]
    inputs = torch.from_numpy(global_batch(9).tokens[0, :11])[None]
    for (family, folder), ours in zip(folders.items(), logits, strict=True):
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path / family, output_loading_info=True)
        assert not report["missing_keys"], family
        assert not report["unexpected_keys"], family
        with torch.no_grad():
            theirs = model.eval()(input_ids=inputs).logits[0, -1].numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=family)
        _, _, plain = next(plain_steps(folder, deepspeed_config(folder), 1))
        trained = dict(model.named_parameters())
        for name, parameter in plain.named_parameters():
            # Adam's first step moves a weight by the learning rate in the direction of its gradient.
            assert (trained[name] - parameter).abs().max() < 0.05 * LEARNING_RATE, (family, name)


def test_evaluation_rehearsal_and_bad_gradients(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    tokens = np.concatenate([global_batch(step).tokens for step in (50, 51)])[:11]
    expected = window_losses(folder, tokens, 3)
    offloaded = [{"deepspeed": {"zero_stage": stage, "offload_optimizer": "cpu"}} for stage in (1, 2, 3)]
    cases: list[dict[str, Any]] = [{"deepspeed": {"zero_stage": stage}} for stage in range(4)] + offloaded[1:]
    cases += [{**case, "precision": "bfloat16"} for case in [*cases[1:4], *offloaded]]
    loss, norm, model = next(plain_steps(folder, deepspeed_config(folder), 1))
    size = sum(parameter.numel() for parameter in model.parameters())
    for measured in run_ranks(workers.evaluate_all, 2, folder, cases, tokens):
        for case, found in zip(cases, measured, strict=True):
            half = "precision" in case
            np.testing.assert_allclose(found["losses"], expected, rtol=1e-3 if half else 1e-5, err_msg=str(case))
            np.testing.assert_array_equal(found["losses"], found["after"], err_msg=str(case))
            assert found["random"], case
            assert found["skipped"].skipped, case
            assert not np.isfinite(found["skipped"].grad_norm), case
            assert found["parameters"] == size
            # Neither the rehearsal nor the dropped gradient is left in the next step.
            assert not found["first"].skipped, case
            assert found["first"].loss == pytest.approx(loss, abs=2e-3 if half else 1e-6), case
            assert found["first"].grad_norm == pytest.approx(norm, rel=1e-2 if half else 1e-6), case

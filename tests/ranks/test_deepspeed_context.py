"""Sequences split over ranks (Ulysses) follow plain torch on whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ranks import deepspeed_workers as workers
from ranks.deepspeed_models import LEARNING_RATE, deepspeed_config, masked_batch, plain_steps, write_model
from ranks.harness import run_ranks
from ranks.tiny import DOMAINS, global_batch
from rewarm.model.reference import window_losses

CONTEXT: dict[str, Any] = {"parallel": {"context": 2}}
STAGES = [{**CONTEXT, "deepspeed": {"zero_stage": stage}} for stage in range(4)]
RECOMPUTED = {**STAGES[3], "activation_recomputation": "full"}
SGD = {"optimizer": {"name": "sgd", "weight_decay": 0.0, "gradient_clipping": 0.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("model"))


def test_masked_batches_on_two_groups_of_two_ranks(folder: Path) -> None:
    """Windows, and halves of windows, that count very different numbers of targets; sums of each domain."""
    cases = [STAGES[1], RECOMPUTED]
    plain = list(plain_steps(folder, deepspeed_config(folder), 4, masked=True))
    for results in run_ranks(workers.train, 4, folder, cases, 4, True):
        for case, found in zip(cases, results, strict=True):
            for step, (ours, (loss, norm, _)) in enumerate(zip(found, plain, strict=True)):
                assert ours.loss == pytest.approx(loss, abs=1e-6), (case, step)
                assert ours.grad_norm == pytest.approx(norm, rel=1e-6), (case, step)
                batch = masked_batch(step)
                assert batch.loss_mask is not None
                kept = [int(batch.loss_mask[batch.domains == index].sum()) for index in range(len(DOMAINS))]
                assert ours.token_counts.tolist() == kept


def test_one_sgd_step_changes_the_weights_by_the_gradient(folder: Path, tmp_path: Path) -> None:
    cases = [{**case, **SGD} for case in STAGES]
    found = run_ranks(workers.one_step, 2, folder, cases, tmp_path / "out")
    _, _, model = next(plain_steps(folder, deepspeed_config(folder, **SGD), 1))
    before = load_file(folder / "model.safetensors")
    for case, after in zip(STAGES, found[0], strict=True):
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.numpy()
            error = np.linalg.norm(before[name] - after[name] - gradient) / np.linalg.norm(gradient)
            assert error < 2e-4, (case, name, error)


def test_evaluation_rehearsal_and_generation(folder: Path) -> None:
    tokens = np.concatenate([global_batch(step).tokens for step in (50, 51)])[:11]
    expected = window_losses(folder, tokens, 3)
    loss, norm, _ = next(plain_steps(folder, deepspeed_config(folder), 1))
    found = run_ranks(workers.evaluate_all, 2, folder, [STAGES[1], STAGES[3], {"deepspeed": {}}], tokens)
    for *split, whole in found:
        for measured in split:
            np.testing.assert_allclose(measured["losses"], expected, rtol=1e-5)
            np.testing.assert_allclose(measured["logits"], whole["logits"], atol=1e-5)
            assert measured["random"]
            assert measured["skipped"].skipped
            assert measured["first"].loss == pytest.approx(loss, abs=1e-6)
            assert measured["first"].grad_norm == pytest.approx(norm, rel=1e-6)


def test_families_whose_attention_can_be_split(tmp_path: Path) -> None:
    """The logits after one step are those of the same step on whole sequences."""
    folders = [write_model(family, tmp_path / family) for family in ("gemma", "gpt_neox", "phi", "olmo2")]
    split = run_ranks(workers.families, 2, folders, STAGES[1], tmp_path / "split")[0]
    for folder, ours in zip(folders, split, strict=True):
        _, _, model = next(plain_steps(folder, deepspeed_config(folder), 1))
        trained = load_file(tmp_path / "split" / folder.name / "model.safetensors")
        for name, parameter in model.named_parameters():
            moved = np.abs(trained[name] - parameter.detach().numpy()).max()
            assert moved < 0.05 * LEARNING_RATE, (folder.name, name)
        assert np.isfinite(ours).all()


def test_layer_that_mixes_positions_is_found_out(folder: Path) -> None:
    for message in run_ranks(workers.mixing_layer, 2, folder, STAGES[1]):
        assert "parallel.context=2 changes what this llama model computes" in message

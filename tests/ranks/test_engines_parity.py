"""Both engines make the same run of the same model: losses, gradient norms, weights, and where they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ranks import engines_workers as workers
from ranks.deepspeed_models import deepspeed_config, plain_steps, write_model
from ranks.harness import run_ranks

STEPS = 8
MEGATRON: dict[str, Any] = {"engine": "megatron"}
DEEPSPEED: dict[str, Any] = {"engine": "deepspeed", "deepspeed": {"zero_stage": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("model"))


def test_losses_and_gradient_norms_of_both_engines_agree(folder: Path) -> None:
    ours, theirs = (run_ranks(workers.train, 2, folder, case, STEPS) for case in (MEGATRON, DEEPSPEED))
    plain = list(plain_steps(folder, deepspeed_config(folder), STEPS))
    assert plain[-1][0] < plain[0][0] - 0.05
    for megatron, deepspeed in zip(ours, theirs, strict=True):
        for one, other, (loss, norm, _) in zip(megatron, deepspeed, plain, strict=True):
            assert one.loss == pytest.approx(other.loss, abs=1e-5)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
            np.testing.assert_allclose(one.loss_sums, other.loss_sums, rtol=1e-5)
            np.testing.assert_array_equal(one.token_counts, other.token_counts)
            assert (one.loss, one.grad_norm) == pytest.approx((loss, norm), rel=1e-5)


def test_one_gradient_step_moves_the_weights_alike(folder: Path, tmp_path: Path) -> None:
    (one, ours), (other, theirs) = (
        run_ranks(workers.descend, 2, folder, case, tmp_path / case["engine"])[0] for case in (MEGATRON, DEEPSPEED)
    )
    assert one.loss == pytest.approx(other.loss, abs=1e-6)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
    before = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() == before.keys()
    for name, start in before.items():
        change = theirs[name] - start
        assert np.linalg.norm(change) > 0, name
        assert np.linalg.norm(ours[name] - theirs[name]) < 2e-4 * np.linalg.norm(change), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_without_parent_starts_alike(tied: bool, tmp_path: Path) -> None:
    """On any layout: half of the joined projections, or a third of them, are drawn as the whole ones are."""
    model = {"model": {"tie_embeddings": tied}}
    cases = [{**MEGATRON, "parallel": {"tensor": 2}}, DEEPSPEED]
    found = [run_ranks(workers.random_weights, 2, {**case, **model}, tmp_path / "weights")[0] for case in cases]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][name], err_msg=name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_state_goes_from_one_engine_to_the_other_bit_for_bit(precision: str, folder: Path, tmp_path: Path) -> None:
    """fp32 parameters, moments and the count of updates; the steps after it are those of the engine it came from."""
    chain = ["megatron", "deepspeed", "megatron"]
    (results,) = run_ranks(workers.hand_over, 1, folder, precision, chain, tmp_path)
    saved = [load_file(tmp_path / str(number) / "model.safetensors") for number in range(len(results))]
    assert len({(tmp_path / str(number) / "portable.json").read_text() for number in range(len(results))}) == 1
    assert all(saved[0][f"{name}/exp_avg"].any() for name in load_file(folder / "model.safetensors"))
    for other in saved[1:]:
        assert other.keys() == saved[0].keys()
        for name, value in saved[0].items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)
    tolerance = 1e-5 if precision == "float32" else 2e-3
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            assert one.loss == pytest.approx(other.loss, abs=tolerance)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=5 * tolerance)

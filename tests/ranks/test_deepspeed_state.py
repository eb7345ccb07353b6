"""The whole of a model's state under the deepspeed engine: what has no gradient, experts, and folders that lie."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ranks import deepspeed_workers as workers
from ranks.deepspeed_models import (
    WITH_CONSTANTS,
    WITH_EXPERTS,
    constants,
    deepspeed_config,
    plain_steps,
    write_model,
)
from ranks.harness import run_ranks
from ranks.tiny import GLOBAL_BATCH_SIZE, global_batch
from rewarm.engine.deepspeed.buffers import freeze, persistent_buffers
from rewarm.engine.deepspeed.model import check_experts
from rewarm.errors import UserError
from rewarm.model.reference import window_losses

TOKENS = np.concatenate([global_batch(step).tokens for step in (50, 51)])[:6]
CASES: list[dict[str, Any]] = [{"deepspeed": {"zero_stage": stage}} for stage in (0, 1, 3)]
CASES += [{"deepspeed": {"zero_stage": 2}, "precision": "bfloat16"}]


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model


@pytest.mark.parametrize("family", WITH_CONSTANTS)
def test_state_without_a_gradient_is_imported_saved_and_exported(family: str, tmp_path: Path) -> None:
    folder = write_model(family, tmp_path / "model")
    kept = constants(_load(folder))
    assert kept and all(not torch.equal(value, torch.ones_like(value)) and value.any() for value in kept.values())
    expected = window_losses(folder, TOKENS, 2)
    for found in run_ranks(workers.state_without_gradient, 2, folder, CASES, TOKENS, tmp_path):
        for case, each in zip(CASES, found, strict=True):
            tolerance = 5e-3 if "precision" in case else 1e-5
            np.testing.assert_allclose(each["imported"], expected, rtol=tolerance, err_msg=str(case))
            np.testing.assert_array_equal(each["loaded"], each["imported"], err_msg=str(case))
    for number, case in enumerate(CASES):
        exported = constants(_load(tmp_path / str(number) / "export"))
        for name, value in kept.items():
            if "precision" in case:
                torch.testing.assert_close(exported[name], value, rtol=1e-2, atol=0)
            else:
                assert torch.equal(exported[name], value), (case, name)
        theirs = window_losses(tmp_path / str(number) / "export", TOKENS, 2)
        np.testing.assert_allclose(found[number]["exported"], theirs, rtol=5e-3 if "precision" in case else 1e-5)
    ((before, after),) = run_ranks(workers.portable_without_gradient, 1, folder, TOKENS, _made(tmp_path / "portable"))
    np.testing.assert_array_equal(before, after)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_experts_under_data_parallelism_are_those_of_one_process(family: str, tmp_path: Path) -> None:
    """Also where a rank's batch sends no token to some of them."""
    folder, count = write_model(family, tmp_path / "model"), 4
    cases: list[dict[str, Any]] = [{"deepspeed": {"zero_stage": stage}} for stage in range(4)]
    expected = [(loss, norm) for loss, norm, _ in plain_steps(folder, deepspeed_config(folder), count)]
    if family == "qwen3_moe":
        assert _experts_left_out(folder) > 0
    for results in run_ranks(workers.train, 2, folder, cases, count):
        for case, steps in zip(cases, results, strict=True):
            found = [(step.loss, step.grad_norm) for step in steps]
            np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=str(case))


def _experts_left_out(folder: Path) -> int:
    """Experts of the first layer without gradient on a rank's whole half of the batch."""
    model = _load(folder).train()
    tokens = torch.from_numpy(global_batch(0).tokens[0:GLOBAL_BATCH_SIZE:2])
    model(input_ids=tokens[:, :-1]).logits.square().mean().backward()
    gradient = dict(model.named_parameters())["model.layers.0.mlp.experts.down_proj"].grad
    assert gradient is not None
    return int((gradient.flatten(1).abs().sum(dim=1) == 0).sum())


def test_experts_that_are_modules_of_their_own_are_refused() -> None:
    class Block(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(number))

    check_experts(Block(1))
    with pytest.raises(UserError, match="experts of this model is a list of 3 experts"):
        check_experts(Block(3))


def test_parameters_that_are_not_trained_become_buffers() -> None:
    module = nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    value = module.bias.detach().clone()
    freeze(module)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert torch.equal(persistent_buffers(module)["bias"], value)
    assert module.state_dict().keys() == {"weight", "bias"}


def _changed(folder: Path, target: Path, change: dict[str, torch.Tensor | None]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors = {name: value for name, value in (tensors | change).items() if value is not None}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_folders_that_are_not_the_model_are_refused_by_name_on_every_rank(tmp_path: Path) -> None:
    folder = write_model("gemma4_text", tmp_path / "model")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    scalar, norm = "model.layers.1.layer_scalar", "model.layers.0.input_layernorm.weight"
    not_finite = torch.ones(64)
    not_finite[63] = float("inf")
    changes: dict[str, dict[str, torch.Tensor | None]] = {
        scalar: {scalar: None},
        "model.layers.0.surplus": {"model.layers.0.surplus": torch.ones(3)},
        norm: {norm: not_finite},
        "model.layers.0.layer_scalar": {"model.layers.0.layer_scalar": torch.tensor([float("nan")])},
        "lm_head.weight": {"lm_head.weight": embedding + 1},
        "model.norm.weight": {"model.norm.weight": torch.ones(64, dtype=torch.int8)},
        "nothing was wrong": {"lm_head.weight": embedding.clone()},
        "another name of the same": {"lm_head.weight": embedding.clone(), "model.embed_tokens.weight": None},
    }
    others = [_changed(folder, tmp_path / str(number), change) for number, change in enumerate(changes.values())]
    for messages in run_ranks(workers.refusals, 2, folder, others, {"deepspeed": {"zero_stage": 3}}):
        for name, message in zip(changes, messages, strict=True):
            assert ("nothing was wrong" if name == "another name of the same" else name) in message, messages


def test_a_model_that_is_not_finite_is_neither_loaded_nor_exported(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "model")
    for exported, loaded in run_ranks(workers.broken, 2, folder, {"deepspeed": {"zero_stage": 2}}, tmp_path):
        assert "model.norm.weight" in exported and "not finite" in exported
        assert "model.norm.weight" in loaded and "checkpoint" in loaded
    assert not (tmp_path / "export").exists()

"""Every ZeRO stage, offload and precision follows plain torch on one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ranks import deepspeed_workers as workers
from ranks.deepspeed_models import deepspeed_config, plain_steps, write_model
from ranks.harness import run_ranks
from rewarm.engine.base import StepResult

STEPS = 15
OFFLOAD = {"offload_optimizer": "cpu"}
STAGES: dict[str, dict[str, Any]] = {f"stage {stage}": {"zero_stage": stage} for stage in range(4)}
OFFLOADED: dict[str, dict[str, Any]] = {f"{name}, offload": {**STAGES[name], **OFFLOAD} for name in list(STAGES)[1:]}
OFFLOADED["stage 3, offload, parameters too"] = {"zero_stage": 3, **OFFLOAD, "offload_parameters": "cpu"}
FP32: dict[str, dict[str, Any]] = {name: {"deepspeed": value} for name, value in (STAGES | OFFLOADED).items()} | {
    "stage 3, small sub-groups": {"deepspeed": {"zero_stage": 3, "sub_group_size": 5000, "persistence_threshold": 0}},
    "stage 1, recomputation": {"activation_recomputation": "full"},
    "stage 3, recomputation": {"activation_recomputation": "full", "deepspeed": {"zero_stage": 3}},
    "stage 0, tensor": {"deepspeed": {"zero_stage": 0}, "parallel": {"tensor": 2}},
    "stage 1, tensor": {"parallel": {"tensor": 2}},
    "stage 3, tensor, offload": {"deepspeed": {"zero_stage": 3, **OFFLOAD}, "parallel": {"tensor": 2}},
}
BF16 = {
    name: {"precision": "bfloat16", "deepspeed": value}
    for name, value in (STAGES | OFFLOADED).items()
    if value["zero_stage"]
}

Reference = list[tuple[float, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("model"))


def reference(folder: Path, steps: int, *, masked: bool = False, **settings: Any) -> Reference:
    config = deepspeed_config(folder, **settings)
    return [(loss, norm) for loss, norm, _ in plain_steps(folder, config, steps, masked=masked)]


def trainer(folder: Path, cases: dict[str, dict[str, Any]]) -> Callable[[str], list[list[StepResult]]]:
    """Results of all cases, on every rank, from a single start of the ranks."""
    found = run_ranks(workers.train, 2, folder, list(cases.values()), STEPS)
    return lambda name: [results[list(cases).index(name)] for results in found]


@pytest.fixture(scope="module")
def fp32(folder: Path) -> Callable[[str], list[list[StepResult]]]:
    return trainer(folder, FP32)


@pytest.fixture(scope="module")
def bf16(folder: Path) -> Callable[[str], list[list[StepResult]]]:
    return trainer(folder, BF16)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Reference:
    return reference(folder, STEPS)


def check(results: Sequence[StepResult], expected: Reference, loss: float, norm: float) -> None:
    for ours, (their_loss, their_norm) in zip(results, expected, strict=True):
        assert not ours.skipped
        assert ours.loss == pytest.approx(their_loss, abs=loss)
        assert ours.grad_norm == pytest.approx(their_norm, rel=norm)


@pytest.mark.parametrize("case", FP32)
def test_fp32_follows_torch(case: str, fp32: Callable[[str], list[list[StepResult]]], plain: Reference) -> None:
    for results in fp32(case):
        check(results, plain, loss=1e-6, norm=1e-6)
        assert results[0].token_counts.tolist() == [128, 128, 0]


@pytest.mark.parametrize("case", BF16)
def test_bfloat16_follows_fp32(case: str, bf16: Callable[[str], list[list[StepResult]]], plain: Reference) -> None:
    for results in bf16(case):
        check(results, plain, loss=2e-3, norm=1e-2)


def test_one_sgd_step_changes_the_weights_by_the_gradient(folder: Path, tmp_path: Path) -> None:
    """Adam hides a wrong scale of the gradient; a plain step does not."""
    sgd = {"optimizer": {"name": "sgd", "weight_decay": 0.0, "gradient_clipping": 0.0}}
    cases = [{**FP32[name], **sgd} for name in FP32]
    found = run_ranks(workers.one_step, 2, folder, cases, tmp_path / "export")
    _, _, model = next(plain_steps(folder, deepspeed_config(folder, **sgd), 1))
    before = load_file(folder / "model.safetensors")
    for case, after in zip(FP32, found[0], strict=True):
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.numpy()
            change = before[name] - after[name]  # the learning rate is 1, for a change well above rounding
            error = np.linalg.norm(change - gradient) / np.linalg.norm(gradient)
            assert error < 2e-4, (case, name, error)


def test_masked_targets_count_equally_over_the_whole_batch(folder: Path) -> None:
    """Ranks and micro-batches with different numbers of targets: the mean is over the targets, not over the ranks."""
    cases = [{"deepspeed": {"zero_stage": stage}, "optimizer": {"gradient_clipping": 0.0}} for stage in range(4)]
    expected = reference(folder, 4, masked=True, optimizer={"gradient_clipping": 0.0})
    for results in run_ranks(workers.train, 2, folder, cases, 4, True):
        for found in results:
            check(found, expected, loss=1e-6, norm=1e-6)

"""What one layout of the deepspeed engine saves any other one continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import deepspeed_workers as workers
from ranks.deepspeed_models import write_model
from ranks.harness import run_ranks
from rewarm.engine.base import StepResult

CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"deepspeed": {"zero_stage": 0}},
    "stage 1": {"deepspeed": {"zero_stage": 1}},
    "stage 2, offload": {"deepspeed": {"zero_stage": 2, "offload_optimizer": "cpu"}},
    "stage 3, sub-groups": {"deepspeed": {"zero_stage": 3, "sub_group_size": 5000, "persistence_threshold": 0}},
    "tensor": {"deepspeed": {"zero_stage": 3}, "parallel": {"tensor": 2}},
}
Saved = tuple[Path, list[list[StepResult]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Every case saved on two ranks, and how it went on."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(workers.save_all, 2, model, list(CASES.values()), folder)[0]


def differences(found: list[StepResult], expected: list[StepResult]) -> float:
    pairs = list(zip(found, expected, strict=True))
    losses = [abs(ours.loss - theirs.loss) for ours, theirs in pairs]
    return max(losses + [abs(ours.grad_norm / theirs.grad_norm - 1) for ours, theirs in pairs])


def test_same_layout_goes_on_bit_for_bit(model: Path, saved: Saved) -> None:
    folder, expected = saved
    own = [[folder / str(number)] for number in range(len(CASES))]
    found = run_ranks(workers.load_all, 2, model, list(CASES.values()), own)[0]
    for loaded, went_on in zip(found, expected, strict=True):
        assert [step.loss for step in loaded[0]] == [step.loss for step in went_on]
        assert [step.grad_norm for step in loaded[0]] == [step.grad_norm for step in went_on]


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_other_layouts_follow(model: Path, saved: Saved, num_ranks: int) -> None:
    """Every checkpoint under other rank counts, stages, offloads and tensor ranks."""
    folder, expected = saved
    cases = [settings for name, settings in CASES.items() if num_ranks > 1 or name != "tensor"]
    paths = [folder / str(number) for number in range(len(CASES))]
    for loaded in run_ranks(workers.load_all, num_ranks, model, cases, [paths] * len(cases))[0]:
        for went_on, steps in zip(expected, loaded, strict=True):
            assert differences(steps, went_on) < 1e-5


def test_a_child_starts_from_the_fp32_main_parameters(model: Path, tmp_path: Path) -> None:
    """A bfloat16 parent's weights are rounded: a child of them alone would not start where the parent ended."""
    cases = [{"precision": "bfloat16", "deepspeed": {"zero_stage": stage}} for stage in (1, 3)]
    for outcome in [each for rank in run_ranks(workers.reset_all, 2, model, cases, tmp_path) for each in rank]:
        assert outcome["main"] and outcome["finer"] > 1000 and outcome["moments"] == 0, outcome

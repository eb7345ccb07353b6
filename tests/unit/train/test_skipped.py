"""The end of a run whose updates are skipped: its advice fits the case."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ranks.tiny import tiny_config
from rewarm.engine.base import StepResult
from rewarm.train.skipped import too_many

NAMES = ("even", "odd", "absent")
NAN = float("nan")


@pytest.mark.parametrize(
    "sums, updated, settings, said, advice",
    [
        ([NAN, NAN, 0], True, {}, [], ["before step 21", "schedule.peak"]),
        ([40.0, 41.0, 0], True, {}, [], ["schedule.warmup"]),
        ([NAN, NAN, 0], False, {}, ["learning rate is not the reason", "the model"], ["initializer_range"]),
        ([NAN, 41.0, 0], False, {}, ["not in even"], ["tokens of even"]),
        ([NAN, NAN, 0], False, {"parent": "models/x", "model": None}, ["parent=models/x"], ["rewarm evaluate"]),
        ([40.0, 41.0, 0], False, {"precision": "bfloat16"}, ["is 4.05"], ["precision=float32"]),
    ],
)
def test_the_advice_fits_the_case(
    sums: list[float], updated: bool, settings: dict[str, Any], said: list[str], advice: list[str]
) -> None:
    config = tiny_config(**settings) if "parent" not in settings else tiny_config().model_copy(update=settings)
    result = StepResult(np.array(sums), np.array([10, 10, 0]), NAN, skipped=True)
    error = too_many(config, NAMES, 30, result, updated=updated)
    assert "10 steps in a row were not finite" in error.message
    assert all(part in error.message for part in said), error.message
    assert all(part in str(error.fix) for part in advice), error.fix
    assert ("schedule.peak" in str(error.fix)) == updated

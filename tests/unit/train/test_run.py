"""What a run counts, and when it ends."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from rewarm.engine.base import StepResult
from rewarm.errors import UserError
from rewarm.train.run import MOST_SKIPPED, Run, StepRecord


def run(last_step: int = 100, said: list[str] | None = None) -> Run:
    """A run of 8 tokens a step without anything around it."""
    config = SimpleNamespace(last_step=last_step, tokens_per_step=8)
    tracker = SimpleNamespace(message=[].append if said is None else said.append)
    stage = SimpleNamespace(folder=Path("runs/a"))
    return Run(*cast(Any, (config, stage, None, None, None, tracker)))


def step(loss: float = 2.0, *, skipped: bool = False, learning_rate: float = 0.5) -> StepRecord:
    result = StepResult(np.array([loss]), np.array([1]), 1.0, skipped)
    return StepRecord(cast(Any, None), result, learning_rate, 0.1)


def test_a_run_begins_with_nothing_trained() -> None:
    fresh = run()
    assert (fresh.step, fresh.tokens, fresh.skipped_in_a_row) == (0, 0, 0)
    assert fresh.last_learning_rate is None and fresh.stop_reason is None and not fresh.poll_stop()
    assert fresh.folder == Path("runs/a")


def test_finished_steps_are_counted() -> None:
    counted = run()
    counted.record(step(learning_rate=0.5))
    counted.record(step(learning_rate=0.25))
    assert (counted.step, counted.tokens, counted.last_learning_rate) == (2, 16, 0.25)


def test_it_is_finished_at_its_last_step_or_when_a_stop_was_asked_for() -> None:
    counted = run(last_step=2)
    assert not counted.finished
    counted.record(step())
    assert not counted.finished
    counted.stop_reason = "SIGTERM"
    assert counted.finished
    counted.stop_reason = None
    counted.record(step())
    assert counted.finished
    counted.step = 3
    assert counted.finished


def test_skipped_steps_are_told_and_too_many_in_a_row_end_the_run() -> None:
    said: list[str] = []
    counted = run(said=said)
    for turn in range(2):
        for _ in range(MOST_SKIPPED - 1):
            counted.record(step(math.nan, skipped=True))
        assert counted.skipped_in_a_row == MOST_SKIPPED - 1 == 9
        if turn == 0:
            counted.record(step())
            assert counted.skipped_in_a_row == 0
    assert said[0] == "step 1: update skipped, the gradient is not finite" and len(said) == 18
    assert said[9] == "step 11: update skipped, the gradient is not finite"
    with pytest.raises(UserError) as caught:
        counted.record(step(skipped=True))
    assert counted.step == 20
    assert caught.value.message == "the gradients of 10 steps in a row were not finite, the last of them at step 20"
    assert caught.value.fix is not None and "a checkpoint before step 11," in caught.value.fix


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_a_run_that_updated_with_it(loss: float) -> None:
    counted = run()
    with pytest.raises(FloatingPointError, match="the loss of step 1 is"):
        counted.record(step(loss))
    run().record(step(loss, skipped=True))

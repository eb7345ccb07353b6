"""How an invocation ended, as a scheduler reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from rewarm.train.session import end_state

LAST = 12


@pytest.mark.parametrize(
    ("step", "evaluated", "stop_reason", "expected"),
    [
        (LAST, LAST, None, "finished"),
        (LAST, LAST, "SIGTERM", "finished"),
        (LAST, 8, "SIGTERM", "stopped"),  # the signal came before the last evaluation: a resume has to make it
        (6, 4, "SIGTERM", "stopped"),
        (6, 4, None, "paused"),
    ],
)
def test_a_run_is_finished_when_its_last_evaluation_is_made(
    step: int, evaluated: int, stop_reason: str | None, expected: str
) -> None:
    run = SimpleNamespace(
        step=step,
        stop_reason=stop_reason,
        config=SimpleNamespace(total_steps=LAST),
        tracker=SimpleNamespace(last_evaluated_step=evaluated),
    )
    assert end_state(cast("Any", run)) == expected

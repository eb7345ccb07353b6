"""``distributed.timeout`` reaches every process group, whoever makes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranks import deepspeed_workers, single_workers
from ranks.deepspeed_models import write_model
from ranks.harness import run_ranks

LIMIT = {"distributed": {"timeout": 7.25}}


def test_of_megatrons_groups() -> None:
    for found in run_ranks(single_workers.timeouts, 2, {**LIMIT, "parallel": {"tensor": 2}}):
        assert len(found) > 10
        assert set(found) == {7.25}


def test_of_deepspeeds_groups_and_those_of_context_ranks(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path)
    cases = [{**LIMIT, "parallel": parallel} for parallel in ({"tensor": 2}, {"context": 2})]
    for found in run_ranks(deepspeed_workers.timeouts, 2, folder, cases):
        assert len(found) > 4
        assert set(found) == {7.25}


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_of_groups_that_are_made_later(backend: str) -> None:
    assert run_ranks(single_workers.default_timeout, 1, LIMIT, backend) == [7.25]

"""``deterministic: true`` asks everything that has a choice, before it chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import deepspeed_workers, single_workers
from ranks.deepspeed_models import write_model
from ranks.harness import run_ranks
from ranks.tiny import tiny_config
from rewarm.engine.deterministic import _WANTED, prepare_environment
from rewarm.errors import UserError

ON: dict[str, Any] = {"deterministic": True}


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16", "offload": {"mode": "cpu"}}], ids=str)
def test_of_megatron(settings: dict[str, Any]) -> None:
    """Everything it runs has a deterministic kernel; on a CPU the losses are what they are without."""
    ((off, _),) = run_ranks(single_workers.deterministic_steps, 1, settings)
    ((on, asked),) = run_ranks(single_workers.deterministic_steps, 1, {**settings, **ON})
    assert on == pytest.approx(off, rel=1e-6)
    assert asked.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8" and asked.pop("NCCL_ALGO") == "Ring"
    assert set(asked.values()) == {True}


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_of_deepspeed(stage: int, tmp_path: Path) -> None:
    folder, settings = write_model("llama", tmp_path), {"deepspeed": {"zero_stage": stage}}
    ((off, _),) = run_ranks(deepspeed_workers.deterministic_steps, 1, folder, settings, timeout=280.0)
    ((on, asked),) = run_ranks(deepspeed_workers.deterministic_steps, 1, folder, {**settings, **ON}, timeout=280.0)
    assert on == pytest.approx(off, rel=1e-6)
    assert set(asked.values()) == {True}


@pytest.mark.parametrize(
    ("name", "value"),
    [("NCCL_ALGO", "NVLS"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("FLASH_ATTENTION_DETERMINISTIC", "0")],
)
def test_a_variable_that_says_otherwise_is_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{name}={value} lets results differ"):
        prepare_environment(True, {name: value})
    prepare_environment(False, {name: value})


def test_a_users_own_choice_of_the_fixed_orders_stays() -> None:
    environment = {"NCCL_ALGO": "tree", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    prepare_environment(True, environment)
    assert environment["NCCL_ALGO"] == "tree" and environment["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_environment_is_ready_before_the_gpu_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewarm.train import session

    class Looked(Exception):
        pass

    def look() -> None:
        import os

        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise Looked

    for name in _WANTED:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(session, "check_device", look)
    with pytest.raises(Looked):
        session.run_session(tiny_config(**ON))

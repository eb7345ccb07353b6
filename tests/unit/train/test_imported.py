"""The comparison of an import with transformers: what it sees, and what it says when it cannot look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewarm.config.load import build
from rewarm.errors import UserError
from rewarm.model.description import HuggingFaceModel
from rewarm.model.huggingface import architecture_from_huggingface
from rewarm.model.reference import window_losses
from rewarm.train import imported
from rewarm.train.imported import check_import, notes_on
from unit.model.families import save_model


class _Engine:
    """One rank that computes what transformers does, but for what is added to each token's loss."""

    is_main = True

    def __init__(self, folder: Path, precision: str, added: float = 0.0, size: int = 100_000) -> None:
        self._folder, self._precision, self._added, self._size = folder, precision, added, size

    def evaluate(self, tokens: np.ndarray, micro_batch_size: int) -> np.ndarray:
        sums = window_losses(self._folder, tokens, micro_batch_size, dtype=self._precision)
        return sums + self._added * (tokens.shape[1] - 1)

    def parameter_count(self) -> int:
        return self._size

    def broadcast(self, value: Any) -> Any:
        return value

    def rng_state(self) -> Any:
        return "state"

    def set_rng_state(self, state: Any) -> None:
        assert state == "state"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    save_model("qwen3", place)
    return place


def _check(folder: Path, precision: str, added: float = 0.0, size: int = 100_000) -> str:
    values = {"name": "x", "parent": str(folder), "data": {"none": "none"}, "precision": precision}
    config = build({**values, "batch": {"sequence_length": 32}})
    engine: Any = _Engine(folder, precision, added, size)
    return check_import(engine, folder, config, architecture_from_huggingface(folder))


@pytest.mark.parametrize("precision, off", [("float32", 0.01), ("bfloat16", 0.2)])
def test_a_loss_that_is_not_that_of_transformers_is_seen(precision: str, off: float, folder: Path) -> None:
    assert _check(folder, precision).startswith("computes what transformers does: ")
    with pytest.raises(UserError, match="does not compute what transformers computes") as caught:
        _check(folder, precision, off)
    assert str(folder) in caught.value.message
    with pytest.raises(UserError, match="does not compute"):
        _check(folder, precision, float("nan"))


def test_what_was_not_compared_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "70 billion parameters" in _check(folder, "float32", size=70_000_000_000)
    monkeypatch.setattr("rewarm.offload.runtime.profile.available_memory", lambda: 1e5)
    said = _check(folder, "float32")
    assert said == "not compared with transformers: it would take 0.0005 GB of host memory, of which 0.0001 GB are free"
    monkeypatch.undo()
    monkeypatch.setattr(imported, "_transformers", lambda *arguments: "transformers cannot load it")
    assert _check(folder, "float32") == "not compared with transformers: transformers cannot load it"


def test_experts_are_told_of() -> None:
    mixtral = HuggingFaceModel({"model_type": "mixtral", "num_local_experts": 8, "router_aux_loss_coef": 0.02})
    (note,) = notes_on(mixtral)
    assert "8 experts" in note and "router_aux_loss_coef=0.02" in note
    (note,) = notes_on(HuggingFaceModel({"text_config": {"n_routed_experts": 64}}))
    assert "64 experts" in note and "router" not in note
    assert notes_on(HuggingFaceModel({"model_type": "gemma"})) == []

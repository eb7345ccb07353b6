"""What evaluating a Hugging Face folder refuses, because the loss would mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewarm.errors import UserError
from rewarm.train.evaluate import evaluate_huggingface
from system.conftest import write_domain


def test_windows_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    write_domain(tmp_path / "counting", 1)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"max_position_embeddings": 8}))
    with pytest.raises(UserError, match=r"windows of 16 tokens are above max_position_embeddings=8(.|\n)*length 8"):
        evaluate_huggingface(tmp_path / "model", {"counting": str(tmp_path / "counting")}, 16, 4, [])

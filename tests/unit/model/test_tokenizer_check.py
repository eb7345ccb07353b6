"""A tokenizer against the rows of a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rewarm.config.model import ModelConfig
from rewarm.data.tokenizer import open_backend
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.reference import _load_tokenizer
from rewarm.model.tokenizer_check import check_tokenizer_fits, required_rows


def save_tokenizer(folder: Path, num_words: int, num_added: int) -> Path:
    """A word-level tokenizer of ``num_words`` and further added tokens."""
    vocabulary = {"<unk>": 0} | {f"word{number}": number for number in range(1, num_words)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>"
    )
    tokenizer.add_tokens([f"<added{number}>" for number in range(num_added)])
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_count_added_tokens(tmp_path: Path) -> None:
    assert required_rows(save_tokenizer(tmp_path / "plain", 50, 0)) == 50
    assert required_rows(save_tokenizer(tmp_path / "added", 50, 3)) == 53


def test_ids_without_a_row_are_refused_and_spare_rows_are_fine(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, 50, 3)
    for rows in (53, 64):
        check_tokenizer_fits(tokenizer, Architecture.from_config(ModelConfig(), vocab_size=rows), "runs/base")
    with pytest.raises(UserError, match=r"ids up to 52, but runs/base has 52 embedding rows"):
        check_tokenizer_fits(tokenizer, Architecture.from_config(ModelConfig(), vocab_size=52), "runs/base")


@pytest.mark.parametrize("text", [None, "{"], ids=["missing", "torn"])
def test_a_folder_without_a_tokenizer_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no tokenizer can be loaded from") as caught:
        required_rows(tmp_path)
    assert str(tmp_path) in caught.value.message


OWN = {"auto_map": {"AutoTokenizer": ["homegrown.HomegrownTokenizer", None]}, "tokenizer_class": "HomegrownTokenizer"}
OWN_MODEL = {"auto_map": {"AutoConfig": "homegrown.HomegrownConfig"}, "model_type": "homegrown"}


@pytest.mark.parametrize("open_it", [required_rows, open_backend, _load_tokenizer])
@pytest.mark.parametrize(("file", "values"), [("tokenizer_config.json", OWN), ("config.json", OWN_MODEL)])
def test_python_files_of_a_tokenizer_are_not_run(
    open_it: Callable[[Path], Any], file: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if the terminal would say yes."""
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    (tmp_path / file).write_text(json.dumps(values))
    (tmp_path / "homegrown.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"Python files of its own \(homegrown") as caught:
        open_it(tmp_path)
    assert str(tmp_path) in caught.value.message and "deepspeed.trust_remote_code" in caught.value.message
    assert not (tmp_path / "was-run").exists()

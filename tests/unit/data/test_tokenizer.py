"""The tokenizer of the build against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rewarm.data.tokenizer import open_backend, open_tokenizer, tokenizer_fingerprint
from rewarm.errors import UserError


def test_tokens_are_those_of_transformers_and_one_eos(tokenizer_folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    ours, theirs = open_tokenizer(tokenizer_folder), AutoTokenizer.from_pretrained(str(tokenizer_folder))
    assert ours.vocab_size == len(theirs) and ours.end_of_document == theirs.eos_token_id
    for text, tokens in zip(texts, ours.encode(texts), strict=True):
        assert tokens.tolist() == [*theirs.encode(text, add_special_tokens=False), theirs.eos_token_id]


def test_saved_truncation_and_padding_do_not_cut_documents(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cutting"
    shutil.copytree(tokenizer_folder, folder)
    backend = open_backend(folder)
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    text = "the cat and the dog ran through the rain " * 20
    (tokens,) = open_tokenizer(folder).encode([text])
    assert tokens.tolist() == open_tokenizer(tokenizer_folder).encode([text])[0].tolist() and len(tokens) > 64
    assert tokenizer_fingerprint(folder) == tokenizer_fingerprint(tokenizer_folder)


def test_fingerprint_goes_by_what_a_tokenizer_does(tokenizer_folder: Path, tmp_path: Path) -> None:
    known = open_tokenizer(tokenizer_folder).fingerprint
    assert tokenizer_fingerprint(tokenizer_folder) == known
    plain = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    for name, change in (
        (
            "vocabulary",
            lambda raw: raw["added_tokens"].append({**raw["added_tokens"][0], "id": 400, "content": "<new>"}),
        ),
        ("pipeline", lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True)),
        ("merges", lambda raw: raw["model"]["merges"].pop(0)),
    ):
        raw = json.loads(json.dumps(plain))
        change(raw)
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(raw))
        assert tokenizer_fingerprint(tmp_path / name) != known, name


def test_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be opened"):
        open_tokenizer(tmp_path)

"""``rewarm tokenizer train``: the same text gives the same tokenizer, which transformers opens."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rewarm.cli.tokenizer import app
from rewarm.data.tokenizer import open_tokenizer
from rewarm.data.tokenizer_training import TrainingSettings, train_from_files
from rewarm.errors import UserError


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> TrainingSettings:
    """A small vocabulary of the shared corpus."""
    return TrainingSettings(inputs=(str(corpus),), output=tmp_path / "tokenizer", vocab_size=320)


def test_the_same_text_gives_the_same_bytes_and_autotokenizer_opens_them(
    settings: TrainingSettings, texts: list[str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    read = train_from_files(dataclasses.replace(settings, special_tokens=("<pad>",)))
    train_from_files(dataclasses.replace(settings, special_tokens=("<pad>",), output=tmp_path / "again"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (settings.output / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert read.documents == len(texts) and read.num_bytes == sum(len(text.encode()) for text in texts)
    ours, theirs = open_tokenizer(settings.output), AutoTokenizer.from_pretrained(str(settings.output))
    assert ours.vocab_size == len(theirs) == 320 and ours.end_of_document_token == theirs.eos_token == "<|endoftext|>"
    assert theirs.convert_tokens_to_ids("<pad>") == 1
    for text, tokens in zip(texts, ours.encode(texts), strict=True):
        assert tokens.tolist() == [*theirs.encode(text), theirs.eos_token_id] and ours.decode(tokens) == text


def test_it_reads_what_a_build_reads_and_a_share_of_it(settings: TrainingSettings, texts: list[str]) -> None:
    folder = Path(settings.inputs[0]).parent / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(texts))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(Path(settings.inputs[0]).read_bytes()))
    every = train_from_files(dataclasses.replace(settings, inputs=(str(folder),)))
    assert every.documents == len(texts) + 1
    size = sum(file.stat().st_size for file in folder.iterdir())
    third = dataclasses.replace(settings, inputs=(str(folder),), output=folder / "third", megabytes=size / 3e6)
    assert train_from_files(third).documents == (len(texts) + 1) // 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 256}, "--vocab-size 256: the bytes and special tokens alone take 257"),
        ({"vocab_size": 100_000}, r"has pairs for \d+ entries only"),
        ({"special_tokens": ("<|endoftext|>",)}, "named twice"),
        ({"special_tokens": ("",)}, "empty"),
        ({"megabytes": 0}, "--megabytes 0 is not a size"),
        ({"text_key": "body"}, "300 of 300 records are malformed, first .*corpus.jsonl:1"),
    ],
)
def test_what_cannot_be_made_is_an_error_and_leaves_nothing(
    changes: dict[str, object], message: str, settings: TrainingSettings
) -> None:
    with pytest.raises(UserError, match=message):
        train_from_files(dataclasses.replace(settings, **changes))  # type: ignore[arg-type]
    assert not settings.output.exists()


def test_the_command_and_what_it_refuses_to_replace(settings: TrainingSettings) -> None:
    command = ["train", settings.inputs[0], "--output", str(settings.output), "--vocab-size", "300"]
    done = CliRunner().invoke(app, [*command, "--special-token", "<pad>", "--end-of-document", "<eod>"])
    assert done.exit_code == 0 and f"tokenizer: {settings.output}" in done.output
    assert json.loads((settings.output / "tokenizer_config.json").read_text())["eos_token"] == "<eod>"
    with pytest.raises(UserError, match="exists already"):
        CliRunner().invoke(app, command, catch_exceptions=False)

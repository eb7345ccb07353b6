"""A tokenizer made from text: byte-level BPE, as ``rewarm tokenizer train`` and the demo make it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rewarm.data.inputs import InputOptions, plan_inputs
from rewarm.data.readers import ShardReader, lines_before
from rewarm.data.records import TextRule
from rewarm.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
# Words, numbers of up to three digits, punctuation and white space, as GPT-4's tokenizer splits them.
_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TOLERANCE = 0.001


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Everything that ``rewarm tokenizer train`` is told."""

    inputs: tuple[str, ...]
    output: Path
    vocab_size: int = 32_000
    special_tokens: tuple[str, ...] = ()
    """Beside the one that ends documents."""
    end_of_document: str = END_OF_DOCUMENT
    text_key: str = "text"
    text_document: Literal["file", "line", "blank"] = "file"
    megabytes: float = 500.0
    """About as much of the input, in 10^6 bytes as it lies on the disk, is learned from."""


@dataclass(slots=True)
class TrainingText:
    """What was read."""

    documents: int = 0
    num_bytes: int = 0
    rejects: list[str] = field(default_factory=list)


def train_from_files(settings: TrainingSettings) -> TrainingText:
    """Train a tokenizer on a sample of documents and write its folder, which appears only when it is whole.

    The same input and settings give the same bytes.

    Returns:
        What it was trained on.

    Raises:
        UserError: if the output exists, the input holds no text or too many malformed records, or the vocabulary
            cannot be reached.
    """
    if settings.megabytes <= 0:
        raise UserError(f"--megabytes {settings.megabytes:g} is not a size", fix="give a positive number")
    if settings.output.exists() and (not settings.output.is_dir() or any(settings.output.iterdir())):
        raise UserError(f"--output {settings.output} exists already", fix="name another folder, or remove it")
    read = TrainingText()
    train_tokenizer(
        _documents(settings, read),
        settings.vocab_size,
        settings.output,
        special_tokens=(settings.end_of_document, *settings.special_tokens),
        more="give more text or a higher --megabytes",
    )
    return read


def _documents(settings: TrainingSettings, read: TrainingText) -> Iterator[str]:
    """Every k-th document, so that about as much as wanted is learned from all over the input."""
    rule = TextRule(settings.text_key)
    plan = plan_inputs(settings.inputs, InputOptions(rule=rule, text_document=settings.text_document))
    stride = max(1, round(plan.num_bytes / (settings.megabytes * 1e6)))
    records = 0
    for shard in plan.shards:
        for item in ShardReader(shard, rule, settings.text_document):
            records += 1
            if item.text is None:
                read.rejects.append(f"{shard.name}:{lines_before(shard) + item.line}: {item.why}")
            elif records % stride == 0 or stride == 1:
                read.documents += 1
                read.num_bytes += len(item.text.encode())
                yield item.text
    if len(read.rejects) > _TOLERANCE * records:
        raise UserError(
            f"{len(read.rejects)} of {records} records are malformed, first {read.rejects[0]}",
            fix="mend them, or check --text-key and the format of the input",
        )
    if not read.num_bytes:
        raise UserError(f"there is no text in {', '.join(settings.inputs)}", fix="check the input")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: Path, *, special_tokens: Sequence[str], more: str
) -> None:
    """Byte-level BPE with the GPT-4 pattern's split of digits, as ``AutoTokenizer`` opens it.

    Args:
        texts: documents to learn from.
        vocab_size: entries, special tokens included.
        folder: what is written; replaced if it exists.
        special_tokens: the first ends documents.
        more: how to get more text, for the message if there is too little.

    Raises:
        UserError: if the size cannot be reached, or special tokens are empty or named twice.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise UserError(
            f"--vocab-size {vocab_size}: the bytes and special tokens alone take {least}", fix=f"give at least {least}"
        )
    if "" in special_tokens or len(set(special_tokens)) < len(special_tokens):
        raise UserError(f"special tokens {list(special_tokens)} are empty or named twice", fix="name each once")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        reached = tokenizer.get_vocab_size()
        raise UserError(
            f"--vocab-size {vocab_size}: the sample text has pairs for {reached} entries only",
            fix=f"lower it to {reached}, or {more}",
        )
    _save(tokenizer.to_str(pretty=True), special_tokens[0], folder)


def _save(text: str, end_of_document: str, folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    (aside / "tokenizer.json").write_text(text, encoding="utf-8")
    # What PreTrainedTokenizerFast.save_pretrained writes; importing it would take longer than all the rest.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_document,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    (aside / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)

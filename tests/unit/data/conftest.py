"""A tokenizer and a corpus small enough for every test."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 256 bytes, an EOS, and a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog ran through the rain"] * 10, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"})
    )
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """300 documents of 240 different texts, of many lengths and scripts."""
    generator = random.Random(5)
    words = ["the", "cat", "né", "你好", "rain", "f(x)", "\n", "  ", "🙂", "dog", "0x1F", "été"]
    different = [f"{i} " + " ".join(generator.choices(words, k=generator.randint(1, 60))) for i in range(240)]
    return different + generator.choices(different, k=60)


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    """The texts as JSON lines."""
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return file

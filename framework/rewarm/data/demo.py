"""``rewarm data demo``: three small domains of real text and a tokenizer, made on the spot."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarm.data import corpora
from rewarm.data.build import BuildSettings, OnProgress, build_domain
from rewarm.data.domain import DOMAIN_FILE
from rewarm.data.tokenizer_training import END_OF_DOCUMENT, train_tokenizer
from rewarm.errors import UserError

DOMAINS = ("english", "python", "cpp")
HELD_OUT = 0.05
"""Share of the documents held out: enough text for a steady loss of a corpus this small."""
_DEMO_FILE = "demo.json"
_FORMAT = "rewarm-demo-1"
_TRAINING_BYTES = 1_200_000


@dataclass(frozen=True, slots=True)
class Demo:
    """What ``rewarm data demo`` made."""

    tokenizer: Path
    domains: dict[str, tuple[Path, dict[str, Any]]]
    """Folder and ``domain.json`` of each domain."""
    changed: bool
    """False if all of it was there before."""


def make_demo(
    output: Path, vocab_size: int = 2048, megabytes: float = 3.0, on_progress: OnProgress = lambda *_: None
) -> Demo:
    """Gather the corpora, train a tokenizer on all of them, and build the domains.

    Args:
        output: folder of the tokenizer and of the domains.
        vocab_size: entries of the tokenizer.
        megabytes: most text of a domain, in 10^6 bytes; there may be less English than that.
        on_progress: told how far it is.

    Raises:
        UserError: if the folder cannot be written or holds something else, or the vocabulary cannot be reached.
    """
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: the bytes alone and EOS take 257", fix="give at least 257")
    if megabytes <= 0:
        raise UserError(f"--megabytes {megabytes} is not a size", fix="give a positive number")
    files = {"english": corpora.english_files(), "python": corpora.python_files(), "cpp": corpora.cpp_files()}
    key = _demo_key(files, vocab_size, megabytes)
    existing = _existing(output, key)
    if existing is not None:
        return existing
    try:
        return _make(output, files, vocab_size, int(megabytes * 1e6), key, on_progress)
    except OSError as error:
        raise UserError(
            f"{error.filename or output}: {error.strerror}", fix="name an --output that can be written and has room"
        ) from error


def _demo_key(files: dict[str, list[corpora.SourceFile]], vocab_size: int, megabytes: float) -> str:
    listed = {domain: [(file.name, file.size) for file in found] for domain, found in files.items()}
    settings = [_FORMAT, platform.python_version(), vocab_size, megabytes, HELD_OUT, _TRAINING_BYTES, listed]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def _existing(output: Path, key: str) -> Demo | None:
    file = output / _DEMO_FILE
    if not file.is_file():
        taken = [name for name in DOMAINS if (output / name / DOMAIN_FILE).exists()]
        if taken and not (output / "text").is_dir():
            raise UserError(f"{output / taken[0]} is a domain of another build", fix="name another --output")
        return None
    try:
        same = json.loads(file.read_text()).get("key") == key
    except ValueError:
        same = False
    pieces = [output / "tokenizer" / "tokenizer.json", *(output / name / DOMAIN_FILE for name in DOMAINS)]
    if not same or not all(piece.is_file() for piece in pieces):
        return None
    infos = {name: (output / name, json.loads((output / name / DOMAIN_FILE).read_text())) for name in DOMAINS}
    return Demo(output / "tokenizer", infos, changed=False)


def _make(
    output: Path,
    files: dict[str, list[corpora.SourceFile]],
    vocab_size: int,
    max_bytes: int,
    key: str,
    on_progress: OnProgress,
) -> Demo:
    texts = output / "text"
    texts.mkdir(parents=True, exist_ok=True)
    (output / _DEMO_FILE).unlink(missing_ok=True)
    for place, name in enumerate(DOMAINS):
        on_progress(f"gathering {name}", place, len(DOMAINS))
        _write_texts(texts / f"{name}.jsonl", corpora.documents(name, files[name], max_bytes))
    on_progress("training the tokenizer", 0, 1)
    samples = [text for name in DOMAINS for text in _sample(texts / f"{name}.jsonl")]
    folder, more = output / "tokenizer", "raise --megabytes"
    train_tokenizer(samples, vocab_size, folder, special_tokens=[END_OF_DOCUMENT], more=more)
    on_progress("training the tokenizer", 1, 1)
    infos = {name: (output / name, _build(output, name, on_progress)) for name in DOMAINS}
    _write_aside(output / _DEMO_FILE, lambda aside: aside.write_text(json.dumps({"key": key}) + "\n"))
    return Demo(output / "tokenizer", infos, changed=True)


def _build(output: Path, name: str, on_progress: OnProgress) -> dict[str, Any]:
    settings = BuildSettings(
        inputs=(str(output / "text" / f"{name}.jsonl"),),
        output=output / name,
        tokenizer=output / "tokenizer",
        held_out=HELD_OUT,
        # The tokenizer's own name for the end of a document occurs in sources about tokenizers.
        special_tokens="text",
        overwrite=True,
    )
    return build_domain(settings, lambda what, done, total: on_progress(f"{what} {name}", done, total))[0]


def _write_texts(path: Path, texts: Any) -> None:
    def write(aside: Path) -> None:
        with open(aside, "w", encoding="utf-8") as stream:
            for text in texts:
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")

    _write_aside(path, write)


def _write_aside(path: Path, write: Callable[[Path], object]) -> None:
    aside = path.with_name(f"{path.name}.partial")
    write(aside)
    os.replace(aside, path)


def _sample(path: Path) -> list[str]:
    """Every k-th document of a corpus, about as many bytes of each corpus."""
    stride = max(1, round(path.stat().st_size / _TRAINING_BYTES))
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line)["text"] for number, line in enumerate(stream) if number % stride == 0]

"""The tokenizer that turns documents into tokens, opened without importing transformers where possible."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Spaces, digits, capitals, code, accents, scripts and bytes that are no word: what pre-tokenizers and normalizers
# of the known families treat differently.
_PROBE = (
    "The  quick\tbrown fox's 12345.67 jumps;\n\n    def f(x_1): return x_1**2  # don't\r\n"
    "Ünïcödé ﬁne Å naïve — “quotes” … 你好。世界 こんにちは Привет мир عربى हिन्दी 🙂👩‍💻 \u0000\u200b\x7f</s><s>"
)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer as the build uses it: no BOS, nothing cut off, an end-of-document id."""

    folder: Path
    backend: Tokenizer
    end_of_document: int
    end_of_document_token: str
    vocab_size: int
    """One more than the largest id, added tokens included."""
    fingerprint: str
    """Of the vocabulary, the merges or scores, and what it makes of a probe text, whatever the file format."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Tokens of each text with the end-of-document token after it: int64 arrays."""
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*one.ids, self.end_of_document], dtype=np.int64) for one in encoded]

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = True) -> str:
        """The text of some ids."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


def open_tokenizer(
    folder: str | Path, *, end_of_document: str | None = None, special_tokens: str = "parse"
) -> TextTokenizer:
    """Open a Hugging Face tokenizer folder.

    Args:
        folder: with ``tokenizer.json``, or with whatever ``AutoTokenizer`` turns into a fast tokenizer.
        end_of_document: token that ends each document; None means the tokenizer's EOS.
        special_tokens: ``parse`` if a special token spelt out in a text becomes that token, as in transformers;
            ``text`` if it is encoded like any other text.

    Raises:
        UserError: if there is no tokenizer, or it has no such token.
    """
    folder = Path(folder)
    backend = open_backend(folder)
    backend.encode_special_tokens = special_tokens == "text"
    name = end_of_document or _eos_name(folder)
    if name is None:
        raise UserError(
            f"the tokenizer {folder} has no EOS token to end documents with",
            fix="name one of its tokens: --end-of-document TOKEN, or add eos_token to its tokenizer_config.json",
        )
    identity = backend.token_to_id(name)
    if identity is None:
        raise UserError(
            f"the tokenizer {folder} has no token {name!r}",
            fix="give --end-of-document a token of its vocabulary",
        )
    vocabulary = backend.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values()) + 1
    return TextTokenizer(folder, backend, identity, name, size, _fingerprint(backend, vocabulary))


def tokenizer_fingerprint(folder: str | Path) -> str:
    """The identity that ``rewarm data build`` records of a tokenizer: equal if it makes the same tokens.

    Raises:
        UserError: if there is no tokenizer.
    """
    backend = open_backend(Path(folder))
    return _fingerprint(backend, backend.get_vocab(with_added_tokens=True))


def open_backend(folder: Path) -> Tokenizer:
    """The bare tokenizer of a folder, which cuts nothing off and pads nothing.

    Raises:
        UserError: if there is none.
    """
    if not folder.is_dir():
        raise UserError(
            f"tokenizer {folder} is not a folder", fix="give the folder of a Hugging Face tokenizer or model"
        )
    try:
        backend = _read_backend(folder)
    except UserError:
        raise
    except Exception as error:  # both libraries raise bare Exception for a file they cannot read
        reason = str(error).strip().splitlines()
        raise UserError(
            f"the tokenizer {folder} cannot be opened: {reason[0] if reason else error!r}",
            fix="give a folder with tokenizer.json",
        ) from error
    if backend is None:
        raise UserError(
            f"the tokenizer {folder} has no fast form",
            fix="convert it: AutoTokenizer.from_pretrained(folder).save_pretrained(other) with a tokenizer.json",
        )
    # A saved truncation would silently cut every document short.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_backend(folder: Path) -> Tokenizer | None:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if file.is_file():
        return Tokenizer.from_file(str(file))
    return getattr(load_with_transformers(folder), "backend_tokenizer", None)


def load_with_transformers(folder: Path) -> Any:
    """What ``AutoTokenizer`` makes of a folder, without running Python files that it brings.

    Raises:
        UserError: if it takes such files.
        Exception: of a dozen kinds, for a folder without tokenizer or with a damaged one.
    """
    from transformers import AutoTokenizer

    try:
        # Left out, trust_remote_code is asked for on the terminal.
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception:
        code = _own_code(folder)
        if code is None:
            raise
        raise UserError(
            f"the tokenizer {folder} brings Python files of its own ({code}), which are never run: "
            "deepspeed.trust_remote_code is for those of the model",
            fix="give the folder of a tokenizer with tokenizer.json, which needs none",
        ) from None


def _own_code(folder: Path) -> str | None:
    """What the folder names as its own code for a tokenizer, or for the model that transformers would know it by."""
    for file in ("tokenizer_config.json", "config.json"):
        try:
            named = json.loads((folder / file).read_text(encoding="utf-8"))["auto_map"]
            found = named.get("AutoTokenizer") or named["AutoConfig"]
            return str(found if isinstance(found, str) else next(name for name in found if name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
            continue
    return None


def _eos_name(folder: Path) -> str | None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / file).is_file():
            continue
        try:
            token = json.loads((folder / file).read_text(encoding="utf-8")).get("eos_token")
        except ValueError as error:
            raise UserError(f"{folder / file} is not JSON: {error}", fix="copy the tokenizer again") from error
        if token:
            return str(token["content"]) if isinstance(token, dict) else str(token)
    return None


def _fingerprint(backend: Tokenizer, vocabulary: dict[str, int]) -> str:
    backend_parses = backend.encode_special_tokens
    backend.encode_special_tokens = False
    probe = backend.encode(_PROBE, add_special_tokens=False).ids
    backend.encode_special_tokens = backend_parses
    model = json.loads(backend.to_str())["model"]
    # Merges are written as "a b" by older versions of the library and as ["a", "b"] by newer ones.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else []
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([sorted(vocabulary.items()), merges, scores, probe]).encode())
    return digest.hexdigest()

"""The tokenizer that turns documents into tokens: the ids of ``AutoTokenizer``."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarm.data.backend import PROBE, read_backend
from rewarm.data.model_folder import TOKENIZER_FILES, list_files, read_json
from rewarm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
    backend, named = _open(folder)
    if backend.encode_special_tokens and special_tokens == "parse":
        raise UserError(
            f"the tokenizer {folder} encodes special tokens like any other text (split_special_tokens in its "
            "tokenizer_config.json)",
            fix="ask for the same: --special-tokens text",
        )
    backend.encode_special_tokens = special_tokens == "text"
    name = end_of_document or named.get("eos_token")
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
    return _open(folder)[0]


def turn_end_warning(tokenizer: TextTokenizer) -> str | None:
    """A warning where the token that ends documents is the one that ends a turn of a conversation, else None.

    The tokenizer of an instruct model names it as its EOS: a model that sees it after each plain document unlearns what
    it stands for.
    """
    name = tokenizer.end_of_document_token
    ends = [token for token in _DOCUMENT_ENDS if token != name and tokenizer.backend.token_to_id(token) is not None]
    template = _chat_template(tokenizer.folder)
    if not (name in _TURN_ENDS and (ends or template)) and not (ends and name in template):
        return None
    other = f"--end-of-document '{ends[0]}'" if ends else "--end-of-document TOKEN, one that no conversation holds"
    return (
        f"documents end with {name!r}, which in this instruct model's tokenizer ends a turn of a conversation and no "
        f"document\n  fix: {other}"
    )


_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>")
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>")


def _chat_template(folder: Path) -> str:
    """The texts of a folder's chat templates, one after the other."""
    files = list_files(folder, ("chat_template.*", "additional_chat_templates/*.jinja")).values()
    known = (read_json(folder, "tokenizer_config.json") or {}).get("chat_template")
    inside = "" if known is None else json.dumps(known, ensure_ascii=False)
    return inside + "".join(file.read_text("utf-8", "replace") for file in files)


def has_tokenizer(folder: Path) -> bool:
    """True if a Hugging Face folder carries a tokenizer, fast or slow."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return any((folder / name).exists() for name in names)


def special_token_ids(folder: Path) -> dict[str, int]:
    """Ids of the special tokens that a tokenizer names, under the keys of a config.json: ``eos_token_id`` and others.

    Raises:
        UserError: if there is no tokenizer.
    """
    backend, named = _open(folder)
    ids = {f"{name}_id": backend.token_to_id(token) for name, token in named.items()}
    return {name: identity for name, identity in ids.items() if identity is not None and name != "unk_token_id"}


def _open(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    if not folder.is_dir():
        raise UserError(
            f"tokenizer {folder} is not a folder", fix="give the folder of a Hugging Face tokenizer or model"
        )
    try:
        backend, named = _read_once(folder, _content(folder))
    except UserError:
        raise
    except Exception as error:  # both libraries raise bare Exception for a file they cannot read
        reason = str(error).strip().splitlines()
        raise UserError(
            f"the tokenizer {folder} cannot be opened: {reason[0] if reason else error!r}",
            fix="give a folder with tokenizer.json",
        ) from error
    own = copy.deepcopy(backend)
    own.encode_special_tokens = backend.encode_special_tokens  # which a copy does not take along
    return own, dict(named)


@lru_cache(maxsize=2)
def _read_once(folder: Path, content: str) -> tuple[Tokenizer, dict[str, str]]:
    """A start looks at its tokenizer several times, and transformers takes seconds to open a large one."""
    backend, named = read_backend(folder)
    # A saved truncation would silently cut every document short.
    backend.no_truncation()
    backend.no_padding()
    return backend, named


def _content(folder: Path) -> str:
    """A digest of all that a tokenizer is read from."""
    digest = hashlib.blake2b(digest_size=16)
    for name, path in list_files(folder, (*TOKENIZER_FILES, "config.json")).items():
        with open(path, "rb") as stream:
            digest.update(name.encode() + hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _fingerprint(backend: Tokenizer, vocabulary: dict[str, int]) -> str:
    backend_parses = backend.encode_special_tokens
    backend.encode_special_tokens = False
    probe = backend.encode(PROBE, add_special_tokens=False).ids
    backend.encode_special_tokens = backend_parses
    model = json.loads(backend.to_str())["model"]
    # Merges are written as "a b" by older versions of the library and as ["a", "b"] by newer ones.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else []
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([sorted(vocabulary.items()), merges, scores, probe]).encode())
    return digest.hexdigest()

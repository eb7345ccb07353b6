"""From a tokenizer's folder to the ``tokenizers`` object that makes the same ids as ``AutoTokenizer``.

``tokenizer.json`` alone does not say which ids a tokenizer makes: ``added_tokens.json``, ``added_tokens_decoder``,
special tokens, ``add_prefix_space`` and the class that ``tokenizer_config.json`` or ``config.json`` names change them.
What they do is left to transformers; only a folder in which nothing of this kind is said is opened without it.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarm.data.model_folder import TOKENIZER_FILES, find_file, list_files, read_json
from rewarm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Spaces, digits, capitals, code, accents, scripts and bytes that are no word: what pre-tokenizers and normalizers
# of the known families treat differently.
PROBE = (
    "The  quick\tbrown fox's 12345.67 jumps;\n\n    def f(x_1): return x_1**2  # don't\r\n"
    "Ünïcödé ﬁne Å naïve — “quotes” … 你好。世界 こんにちは Привет мир عربى हिन्दी 🙂👩‍💻 \u0000\u200b\x7f</s><s>"
)
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_PLAIN_KEYS = frozenset(
    [*NAMED_TOKENS, "tokenizer_class", "clean_up_tokenization_spaces", "model_max_length", "chat_template", "backend"]
)
"""Keys of tokenizer_config.json that leave the ids alone, if the tokens they name are in tokenizer.json."""
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_MAX_PROBED_TOKENS = 512


class OwnCode(UserError):
    """A tokenizer that only Python files of its folder can open."""


def read_backend(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a folder, as it was saved.

    Returns:
        The tokenizer, and its special tokens by the names of ``NAMED_TOKENS``; a token that it has not is left out.

    Raises:
        UserError: if there is none in a fast form, it brings code, or it makes other ids than ``AutoTokenizer``.
        Exception: both libraries raise bare ones for a file they cannot read.
    """
    from tokenizers import Tokenizer

    file = find_file(folder, "tokenizer.json")
    if file is not None:
        alone = Tokenizer.from_file(str(file))
        if _stands_alone(folder, alone):
            return alone, _named_tokens(read_json(folder, "tokenizer_config.json") or {})
    try:
        tokenizer = load_with_transformers(folder)
    except OwnCode:
        if file is None:
            raise
        from transformers import PreTrainedTokenizerFast

        # What its files say without the code, as everything reads them that does not run Python.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer {folder} has no fast form",
            fix="convert it: AutoTokenizer.from_pretrained(folder).save_pretrained(other) with a tokenizer.json",
        )
    _check_same_ids(folder, tokenizer, backend)
    return backend, _named_tokens({name: getattr(tokenizer, name, None) for name in NAMED_TOKENS})


def load_with_transformers(folder: Path) -> Any:
    """What ``AutoTokenizer`` makes of a folder, without running Python files that it brings.

    Raises:
        UserError: if it takes such files, a package that is not installed, or files from outside of the folder.
        Exception: of a dozen kinds, for a folder without tokenizer or with a damaged one.
    """
    from transformers import AutoTokenizer

    list_files(folder, (*TOKENIZER_FILES, "config.json"))  # refuses links that lead out
    try:
        # Left out, trust_remote_code is asked for on the terminal.
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception:
        code = _own_code(folder)
        if code is not None:
            raise OwnCode(
                f"the tokenizer {folder} brings Python files of its own ({code}), which are never run: "
                "deepspeed.trust_remote_code is for those of the model",
                fix="give the folder of a tokenizer with tokenizer.json, which needs none",
            ) from None
        _check_packages(folder)
        raise


def _stands_alone(folder: Path, backend: Tokenizer) -> bool:
    """True if nothing beside tokenizer.json can change the ids that transformers makes."""
    config = read_json(folder, "tokenizer_config.json")
    names = set(list_files(folder, (*TOKENIZER_FILES, "config.json")))
    if any(name not in ("tokenizer.json", "tokenizer_config.json") and "chat_template" not in name for name in names):
        return False
    if config is None:
        return True
    added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    named = [config[key] for key in NAMED_TOKENS if config.get(key) is not None]
    return (
        config.get("tokenizer_class") in _PLAIN_CLASSES
        and config.keys() <= _PLAIN_KEYS
        and all(isinstance(token, str) and token in added for token in named)
    )


def _named_tokens(values: dict[str, Any]) -> dict[str, str]:
    return {name: str(values[name]) for name in NAMED_TOKENS if values.get(name) is not None}


def _check_same_ids(folder: Path, tokenizer: Any, backend: Tokenizer) -> None:
    """Refuse a tokenizer whose class does more to a text than the backend that the builds use."""
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    texts = [PROBE, " leading", "", *PROBE.splitlines()]
    texts += [f"a {token}b  {token} {token}{token}\n" for token in added[:_MAX_PROBED_TOKENS]]
    for text in texts:
        theirs = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        ours = backend.encode(text, add_special_tokens=False).ids
        if theirs != ours:
            raise UserError(
                f"the tokenizer {folder} makes other ids of {text[:60]!r} in AutoTokenizer ({theirs[:8]} ...) than its "
                f"fast form alone ({ours[:8]} ...): {type(tokenizer).__name__} changes texts in Python",
                fix="convert it to a tokenizer whose tokenizer.json does all of it",
            )


def _own_code(folder: Path) -> str | None:
    """What the folder names as its own code for a tokenizer, or for the model that transformers would know it by."""
    for file in ("tokenizer_config.json", "config.json"):
        try:
            named = (read_json(folder, file) or {})["auto_map"]
            found = named.get("AutoTokenizer") or named["AutoConfig"]
            return str(found if isinstance(found, str) else next(name for name in found if name))
        except (UserError, KeyError, TypeError, AttributeError, StopIteration):
            continue
    return None


def _check_packages(folder: Path) -> None:
    """Name the package that a SentencePiece model needs: without it transformers takes the file for one of tiktoken."""
    if find_file(folder, "tokenizer.json") is not None:
        return
    for name in _SENTENCEPIECE:
        file = find_file(folder, name)
        if file is None or _is_tiktoken(file):
            continue
        missing = [package for package, module in _PACKAGES.items() if not _is_installed(module)]
        if missing:
            raise UserError(
                f"the tokenizer {folder} is a SentencePiece model ({name}), and the package {missing[0]} that reads it "
                "is not installed",
                fix=f"pip install {' '.join(missing)}; or give a folder with tokenizer.json",
            )


_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that a dotted name lies in
        return False


def _is_tiktoken(file: Path) -> bool:
    """True for lines of a token in base64 and its rank; a SentencePiece model is a binary message."""
    with open(file, "rb") as stream:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* [0-9]+", stream.readline(4096).strip()) is not None

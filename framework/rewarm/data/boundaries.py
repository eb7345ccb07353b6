"""Where documents begin and end in a stream of tokens: whether a tokenizer and a domain agree about it.

A model learns the marks of the beginning (BOS) and end (EOS) of a document that its training data had. Data without
them, or with others, is trained on without an error, so that the difference has to be looked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarm.data.indexed import IndexedTokens
from rewarm.data.tokenizer import open_backend
from rewarm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from rewarm.data.domain import Domain

_LOOKED_AT = 64
"""Documents of a bare pair that are looked at, evenly over it."""
_SAME_ENDS = 8
"""Documents that do not end with one token by chance."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A special token."""

    token: str
    identity: int


@dataclass(frozen=True, slots=True)
class DocumentMarks:
    """What a tokenizer puts around a text, and has for its end."""

    leading: Mark | None
    """The token in front of every text that is encoded; None if there is none, as in GPT-2 and Qwen."""
    bos: Mark | None
    """The token that is meant to be there, put there or not."""
    eos: Mark | None


def document_marks(folder: Path) -> DocumentMarks:
    """The marks of a tokenizer.

    Raises:
        UserError: if there is no tokenizer.
    """
    backend = open_backend(folder)
    bos, eos = (_mark(backend, _configured(folder, name)) for name in ("bos_token", "eos_token"))
    leading = _leading(backend)
    if _configured(folder, "add_bos_token") is False:
        leading = None
    elif _configured(folder, "add_bos_token") is True:
        leading = bos or leading
    return DocumentMarks(leading, leading or bos, eos)


def _leading(backend: Tokenizer) -> Mark | None:
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    if len(whole) <= len(plain) or whole[: len(plain)] == plain:
        return None
    return Mark(str(backend.id_to_token(whole[0])), whole[0])


def _mark(backend: Tokenizer, token: Any) -> Mark | None:
    name = token["content"] if isinstance(token, dict) and "content" in token else token
    identity = backend.token_to_id(name) if isinstance(name, str) else None
    return None if identity is None else Mark(name, identity)


def _configured(folder: Path, name: str) -> Any:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            value = json.loads((folder / file).read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError, AttributeError):
            continue
        if value is not None:
            return value
    return None


def chosen_bos(folder: Path, wanted: bool | None) -> tuple[Mark | None, str | None]:
    """The token that goes in front of each document of a build.

    Args:
        folder: of the tokenizer.
        wanted: whether the user asks for one; None if the user says nothing, which means none.

    Returns:
        The token or None, and what the user should know.

    Raises:
        UserError: if the tokenizer has no such token.
    """
    marks = document_marks(folder)
    if wanted:
        if marks.bos is None:
            raise UserError(f"--bos: the tokenizer {folder} has no BOS token", fix="remove --bos")
        return marks.bos, None
    if wanted is None and marks.leading is not None:
        return None, (
            f"no document begins with {marks.leading.token}, although the tokenizer puts it in front of every text: if "
            "the model was trained with it, build with --bos (--no-bos silences this)"
        )
    return None, None


def boundary_notices(domains: list[Domain], tokenizer: Path, *, has_parent: bool) -> list[str]:
    """What should be known of domains whose documents have other marks than the model's tokenizer suggests.

    Args:
        domains: that are trained on.
        tokenizer: folder of the model's.
        has_parent: whether the model was trained before, perhaps with a BOS.

    Raises:
        UserError: if there is no tokenizer.
    """
    marks = document_marks(tokenizer)
    notices = []
    for domain in domains:
        begins, ends = _habits(domain, marks)
        if not ends and marks.eos is not None:
            notices.append(
                f"domain {domain.name!r} ({domain.path}): no document ends with {marks.eos.token}, so that documents "
                "run into each other and the model does not learn to stop (Megatron's preprocess_data.py needs "
                "--append-eod; rewarm data build writes it)"
            )
        refused = domain.info.get("bos_refused") is True
        if has_parent and not begins and marks.leading is not None and not refused:
            notices.append(
                f"domain {domain.name!r} ({domain.path}): no document begins with {marks.leading.token}, which the "
                "tokenizer puts in front of every text: if the parent was trained with it, build the domain with --bos"
            )
    return notices


def _habits(domain: Domain, marks: DocumentMarks) -> tuple[bool, bool]:
    """Whether any document that is looked at begins with BOS, and whether any ends with EOS or all with one token."""
    if domain.info:
        return domain.info.get("beginning_of_document") is not None, True
    source: IndexedTokens = domain.train.source
    count = min(_LOOKED_AT, source.num_documents)
    looked_at = [source.document(source.num_documents * place // count) for place in range(count)]
    first = {int(document[0]) for document in looked_at if len(document)}
    last = {int(document[-1]) for document in looked_at if len(document)}
    begins = marks.leading is not None and marks.leading.identity in first
    return begins, (marks.eos is not None and marks.eos.identity in last) or (len(last) == 1 and count >= _SAME_ENDS)

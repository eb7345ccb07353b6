"""Metadata conditioning: a text that names the domain stands before its documents, and is not learned itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rewarm.data.tokenizer import open_backend
from rewarm.data.windows import WindowReader
from rewarm.errors import UserError


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Prefixes that hold for the first samples of a stage (Gao et al. 2025, "Metadata Conditioning Accelerates
    Language Model Pre-training")."""

    prefixes: Mapping[str, np.ndarray]
    """int64 [P] by domain; a domain without one is fed as it is."""
    stop: int
    """Global sample index from which windows are plain: the cooldown."""


def prefix_tokens(prefixes: Mapping[str, str], tokenizer: Path | None, longest: int) -> dict[str, np.ndarray]:
    """Tokens of the prefixes, without those that a tokenizer puts around a text.

    Args:
        prefixes: text by domain.
        tokenizer: folder.
        longest: most tokens of one.

    Raises:
        UserError: if there is no tokenizer, or a prefix has no tokens or too many.
    """
    if tokenizer is None:
        raise UserError(
            "mixture.conditioning.prefixes are text, and no tokenizer is known",
            fix="set tokenizer to the folder of the one that the domains were built with",
        )
    backend = open_backend(tokenizer)
    found = {}
    for name, text in prefixes.items():
        identities = backend.encode(text, add_special_tokens=False).ids
        if not 1 <= len(identities) <= longest:
            raise UserError(
                f"mixture.conditioning.prefixes.{name}={text!r} has {len(identities)} tokens; a window takes 1 to "
                f"{longest}, half of its length",
                fix="shorten it, or raise batch.sequence_length" if identities else "write a text, or leave it out",
            )
        found[name] = np.array(identities, dtype=np.int64)
    return found


def read_with_prefix(reader: WindowReader, windows: np.ndarray, prefix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows with the prefix at their start and before each document that begins inside them.

    A window keeps its length: what the prefixes push beyond its end is left out, so this pass over the domain does
    not train on the last tokens of its windows. Which windows come when stays the same.

    Args:
        reader: of the domain's train split.
        windows: int [B].
        prefix: int64 [P].

    Returns:
        Tokens int64 [B, S + 1], and the loss mask bool [B, S], False where the target is a token of the prefix. The
        token after a prefix is a target.
    """
    plain = reader.read(windows)
    tokens, learned = np.empty_like(plain), np.empty(plain.shape, dtype=bool)
    for row, window in enumerate(np.asarray(windows).tolist()):
        starts = [0, *reader.document_starts(window)]
        pieces = np.split(plain[row], starts[1:])
        line = np.concatenate([part for piece in pieces for part in (prefix, piece)])
        own = np.concatenate([np.arange(len(prefix) + len(piece)) >= len(prefix) for piece in pieces])
        tokens[row], learned[row] = line[: plain.shape[1]], own[: plain.shape[1]]
    return tokens, learned[:, 1:]

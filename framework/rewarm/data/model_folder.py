"""Files of a Hugging Face folder, read only where they are regular files of that folder.

Model folders come from strangers. A link in one may lead to a private key, to ``/`` or to a device, and what is read
here is copied into runs and exports.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from rewarm.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Names of what a tokenizer consists of in a Hugging Face folder."""
_MODEL_FILES = ("config.json", "lineage.json", "*.safetensors", "*.bin", "*.index.json", "*.py")
MAX_BYTES = 256 * 2**20
"""Largest file that is taken for a part of a tokenizer; the largest known are a tenth of it."""


def find_file(folder: str | Path, name: str, limit: int = MAX_BYTES) -> Path | None:
    """Where a file of a model folder really lies.

    The hub's cache keeps ``snapshots/REVISION/NAME`` as a link into the ``blobs`` folder of the same model, which is
    as good as a file of the folder.

    Args:
        folder: the model or tokenizer.
        name: of the file, relative to it.
        limit: most bytes.

    Returns:
        The path without links, or None if there is nothing of that name.

    Raises:
        UserError: for a link that leads out of the folder or nowhere, what is no regular file, or one above the limit.
    """
    path = Path(folder) / name
    if not os.path.lexists(path):
        return None
    try:
        real, root = path.resolve(strict=True), Path(folder).resolve()
        status = real.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        raise UserError(f"{path} is a link that leads nowhere", fix="put the file itself there") from error
    if not any(real.is_relative_to(place) for place in (root, _blobs(root)) if place is not None):
        raise UserError(
            f"{path} is a link to {real}, which lies outside of {folder}: it is not followed",
            fix="put the file itself there, or remove the link",
        )
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is {_kind(status.st_mode)} and not a file", fix="put the file there, or remove it")
    if status.st_size > limit:
        raise UserError(
            f"{path} has {status.st_size:,} bytes; at most {limit:,} are taken for a file of that name",
            fix="remove it, or put the right file there",
        )
    return real


def list_files(folder: str | Path, patterns: tuple[str, ...], limit: int = MAX_BYTES) -> dict[str, Path]:
    """The files of a model folder under some names.

    Args:
        folder: the model or tokenizer.
        patterns: names with wildcards, relative to it. Folders that fit one are passed over.
        limit: most bytes of each.

    Returns:
        Name -> path without links, sorted by name.

    Raises:
        UserError: as :func:`find_file`.
    """
    folder = Path(folder)
    names = {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)}
    # glob finds no link that leads nowhere under a name without wildcards
    names |= {pattern for pattern in patterns if "*" not in pattern and os.path.lexists(folder / pattern)}
    found = {}
    for name in sorted(names):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            continue
        real = find_file(folder, name, limit)
        if real is not None:  # it may go away between the two looks
            found[name] = real
    return found


def check_model_folder(folder: str | Path) -> None:
    """Refuse a model folder in which weights, configuration, code or tokenizer are not files of its own.

    Raises:
        UserError: as :func:`find_file`.
    """
    list_files(folder, (*_MODEL_FILES, *TOKENIZER_FILES), limit=sys.maxsize)


def read_json(folder: str | Path, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of a model folder, or None if there is no such file.

    Raises:
        UserError: as :func:`find_file`, and if it holds no JSON object.
    """
    path = find_file(folder, name)
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{Path(folder) / name} is not JSON: {error}", fix="copy the folder again") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{Path(folder) / name} holds {type(values).__name__}, not an object", fix="copy the folder again"
        )
    return values


def _blobs(root: Path) -> Path | None:
    """Where the hub's cache keeps the files of the snapshot that a folder is or lies in."""
    for place in (root, *root.parents):
        if place.parent.name == "snapshots":
            return place.parent.parent / "blobs"
    return None


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISSOCK: "a socket",
    }
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "something else")

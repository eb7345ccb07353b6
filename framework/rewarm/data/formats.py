"""What a file is: its kind by its name, its compression and encoding by its first bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rewarm.data.compressed import (
    COMPRESSED_SUFFIXES,
    MAGIC_BYTES,
    Compression,
    compression_of,
    open_stream,
    read_all,
    unreadable,
)
from rewarm.data.encodings import HEAD_BYTES, MARK, UTF_8, as_utf8, decide_encoding
from rewarm.errors import UserError

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COLUMNAR = ("parquet", "arrow")
_SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
KNOWN = ", ".join(_SUFFIXES)
_ARROW_FILE = b"ARROW1"


@dataclass(frozen=True, slots=True)
class FileFormat:
    """How a file is read."""

    kind: Kind
    compression: Compression = ""
    encoding: str = UTF_8


def suffix_kind(path: Path) -> Kind | None:
    """The kind of a file by its name, or None if the name says nothing."""
    return _SUFFIXES.get(_without_compression(path).suffix.lower())


def may_hold_text(path: Path) -> bool:
    """Whether a file of this name is worth opening: one of a known kind, or a compressed one of whatever text."""
    return suffix_kind(path) is not None or path.suffix.lower() in COMPRESSED_SUFFIXES


def _without_compression(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path


def probe(path: Path, name: str, kind: Kind | None, encoding: str | None) -> FileFormat | None:
    """How to read a file, from a look at its beginning; None if it is not text and of no known kind.

    Args:
        path: a regular file with at least one byte.
        name: as the user knows it.
        kind: by its name or by the user's word; None leaves it to the content.
        encoding: what the user named for files without a byte-order mark.

    Raises:
        UserError: if it cannot be read, or its compression or encoding is none that is.
    """
    try:
        with open(path, "rb") as raw:
            magic = raw.read(MAGIC_BYTES)
            raw.seek(0)
            if kind is None and magic.startswith((b"PAR1", _ARROW_FILE)):
                kind = "parquet" if magic.startswith(b"PAR1") else "arrow"
            compression = compression_of(magic, name)
            if kind in COLUMNAR:
                if compression:
                    raise UserError(f"{name} is compressed as a whole ({compression})", fix="unpack it: gunzip, unzstd")
                return FileFormat(kind)
            stream = open_stream(raw, compression)
            head = read_all(stream, name, HEAD_BYTES)
            found = decide_encoding(head, encoding, name)
            raw.seek(0)
            text = read_all(as_utf8(open_stream(raw, compression), found, name), name, HEAD_BYTES)
    except OSError as error:
        raise unreadable(name, error) from error
    if kind is None and b"\0" in text:
        return None
    return FileFormat(_kind_of(text, kind), compression, found)


def _kind_of(head: bytes, kind: Kind | None) -> Kind:
    """Tell JSON lines from other JSON, and both from text."""
    if kind not in (None, "json"):
        return kind
    line, end, _ = head.decode(errors="replace").lstrip(MARK).lstrip().partition("\n")
    if kind == "json" and line.startswith("["):
        return "json"
    try:
        is_record = isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        # A first line that is longer than the look taken at it is one record, as far as can be seen.
        is_record = not end and len(head) >= HEAD_BYTES and line.startswith("{")
    if kind == "json":
        return "jsonl" if is_record or not line.startswith("{") else "json"
    return "jsonl" if is_record else "text"

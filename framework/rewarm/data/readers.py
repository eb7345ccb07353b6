"""Documents out of text, JSON lines and columnar files, one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from rewarm.data.compressed import is_compressed, open_stream, read_all, read_line
from rewarm.errors import UserError

Kind = Literal["text", "jsonl", "parquet", "arrow"]
MAX_DOCUMENT_BYTES = 256 * 2**20
"""Longest document: beyond it one text would take gigabytes to tokenize."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A piece of the input that one worker reads from its start to its end."""

    kind: Kind
    path: str
    size: int
    """Bytes of the file."""
    modified: int
    """Its time of change, nanoseconds."""
    start: int = 0
    stop: int = 0
    """Bytes of a file of lines, row groups of parquet, record batches of Arrow. A line belongs to the shard that
    holds its first byte."""
    weight: int = 0
    """Share of the file's bytes, for the progress bar."""


@dataclass(frozen=True, slots=True)
class Item:
    """One record of the input: a document, or why it is none."""

    line: int
    """Line or row within the shard, from 1; in a whole text file always 1."""
    text: str | None
    why: str = ""
    """Why it is malformed, where text is None."""
    raw: str = ""
    """The malformed record as it stands."""


class ShardReader:
    """Iterates over the records of a shard.

    Args:
        shard: what to read.
        text_key: field or column that holds the text.
        text_document: what one document of a text file is.

    Attributes:
        consumed: bytes of ``shard.weight`` read so far.
        lines: lines or rows of the shard seen so far.
    """

    def __init__(self, shard: Shard, text_key: str, text_document: Literal["file", "line", "blank"]) -> None:
        self.shard, self.text_key, self.text_document = shard, text_key, text_document
        self.consumed = 0
        self.lines = 0

    def __iter__(self) -> Iterator[Item]:
        kind = self.shard.kind
        if kind == "jsonl":
            yield from self._json_lines()
        elif kind == "text":
            yield from self._texts()
        elif kind == "parquet":
            yield from self._parquet()
        else:
            yield from self._arrow()
        self.consumed = self.shard.weight

    def _json_lines(self) -> Iterator[Item]:
        for raw in self._raw_lines():
            if not raw.strip():
                continue
            try:
                record = json.loads(raw)
            except (ValueError, RecursionError) as error:
                yield self._reject(f"not JSON: {error}", raw)
                continue
            if not isinstance(record, dict):
                yield self._reject(f"not an object but {type(record).__name__}", raw)
            elif self.text_key not in record:
                yield self._reject(f"no key {self.text_key!r}; it has {sorted(record)[:8]}", raw)
            else:
                yield self._checked(record[self.text_key], raw)

    def _texts(self) -> Iterator[Item]:
        if self.text_document == "line":
            for raw in self._raw_lines():
                yield self._decoded(raw.rstrip(b"\r\n"))
        elif self.text_document == "file":
            with self._open() as (_, stream):
                raw = read_all(stream, self.shard.path, MAX_DOCUMENT_BYTES + 1)
            fix = "say what a document of a .txt file is: --text-document line, or --text-document blank"
            yield self._decoded(self._bounded(raw, "is one document", fix))
            self.lines = 1
        else:
            block: list[bytes] = []
            first = 1
            for raw in self._raw_lines():
                if raw.strip():
                    first = first if block else self.lines
                    block.append(raw)
                elif block:
                    yield self._decoded(b"".join(block).rstrip(b"\r\n"), first)
                    block = []
            if block:
                yield self._decoded(b"".join(block).rstrip(b"\r\n"), first)

    def _bounded(self, raw: bytes, what: str, fix: str) -> bytes:
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise UserError(f"{self.shard.path} {what} of more than {MAX_DOCUMENT_BYTES >> 20} MiB", fix=fix)
        return raw

    def _raw_lines(self) -> Iterator[bytes]:
        shard = self.shard
        compressed = is_compressed(shard.path)
        with self._open() as (file, stream):
            position = shard.start
            if shard.start:
                # The line that runs over the border belongs to the shard before.
                stream.seek(shard.start - 1)
                position += len(stream.readline()) - 1
            while compressed or position < shard.stop:
                raw = read_line(stream, shard.path, MAX_DOCUMENT_BYTES + 1)
                if not raw:
                    break
                self._bounded(raw, "has a line", "one document a line is expected: check the format of the file")
                position += len(raw)
                self.lines += 1
                self.consumed = min(shard.weight, file.tell() if compressed else position - shard.start)
                yield raw

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        with open(self.shard.path, "rb") as raw:
            yield raw, open_stream(raw, self.shard.path)

    def _parquet(self) -> Iterator[Item]:
        import pyarrow.parquet

        shard = self.shard
        with pyarrow.parquet.ParquetFile(shard.path) as file:
            for group in range(shard.start, shard.stop):
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[self.text_key]):
                    yield from self._column(batch.column(0))
                self.consumed = shard.weight * (group + 1 - shard.start) // (shard.stop - shard.start)

    def _arrow(self) -> Iterator[Item]:
        import pyarrow

        shard = self.shard
        with pyarrow.memory_map(shard.path) as source:
            for number, batch in enumerate(pyarrow.ipc.open_stream(source)):
                if number >= shard.stop:
                    break
                if number >= shard.start:
                    yield from self._column(batch.column(self.text_key))
                    self.consumed = shard.weight * (number + 1 - shard.start) // (shard.stop - shard.start)

    def _column(self, column: Any) -> Iterator[Item]:
        for value in column:
            self.lines += 1
            yield self._checked(value.as_py(), b"")

    def _decoded(self, raw: bytes, line: int | None = None) -> Item:
        try:
            return Item(line or max(1, self.lines), raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            return self._reject(f"not UTF-8 at byte {error.start}: {error.reason}", raw, line)

    def _checked(self, text: Any, raw: bytes) -> Item:
        if not isinstance(text, str):
            return self._reject(f"{self.text_key!r} is not a text but {type(text).__name__}", raw)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return self._reject(f"{self.text_key!r} holds half a surrogate pair at character {error.start}", raw)
        return Item(self.lines, text)

    def _reject(self, why: str, raw: bytes, line: int | None = None) -> Item:
        shown = raw.decode("utf-8", errors="backslashreplace").rstrip("\n")
        return Item(line or max(1, self.lines), None, why, shown)


def suffix_kind(path: Path) -> Kind | None:
    """The kind of a file by its name, or None if it is none that is read directly."""
    name = path.name.lower()
    for ending, kind in ((".txt", "text"), (".jsonl", "jsonl")):
        if name.endswith((ending, f"{ending}.gz", f"{ending}.zst")):
            return kind  # type: ignore[return-value]
    return "parquet" if name.endswith(".parquet") else None

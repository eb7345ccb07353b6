"""Documents out of files of text and of records, one shard at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal, assert_never

from rewarm.data.columnar import columnar_rows, rows_before
from rewarm.data.compressed import Compression, open_stream, read_all, read_line, unreadable
from rewarm.data.encodings import MARK, UTF_8, as_utf8
from rewarm.data.formats import COLUMNAR, Kind
from rewarm.data.records import Malformed, TextRule, checked_text
from rewarm.data.tables import csv_rows, json_values
from rewarm.errors import UserError

MAX_DOCUMENT_BYTES = 256 * 2**20
"""Longest document: beyond it one text would take gigabytes to tokenize."""
TextDocument = Literal["file", "line", "blank"]


@dataclass(frozen=True, slots=True)
class InputShard:
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
    compression: Compression = ""
    encoding: str = UTF_8
    name: str = ""
    """The file as the user knows it, for messages; pieces of one input have one name."""

    @property
    def is_sequential(self) -> bool:
        """Whether the file can only be read from its start."""
        return bool(self.compression) or self.encoding != UTF_8


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
        rule: what of a record is its text.
        text_document: what one document of a text file is.

    Attributes:
        consumed: bytes of ``shard.weight`` read so far.
        lines: lines or rows of the shard seen so far.
    """

    def __init__(self, shard: InputShard, rule: TextRule, text_document: TextDocument) -> None:
        self.shard, self.rule, self.text_document = shard, rule, text_document
        self.consumed = 0
        self.lines = 0

    def __iter__(self) -> Iterator[Item]:
        try:
            self._check_unchanged()
            yield from self._records()
        except OSError as error:
            raise unreadable(self.shard.name, error) from error
        self.consumed = self.shard.weight

    def _records(self) -> Iterator[Item]:
        match self.shard.kind:
            case "jsonl":
                return self._json_lines()
            case "text":
                return self._texts()
            case "json":
                return self._json_values()
            case "parquet" | "arrow":
                return self._columnar()
            case "csv":
                return self._csv(",")
            case "tsv":
                return self._csv("\t")
        assert_never(self.shard.kind)

    def _check_unchanged(self) -> None:
        """The pieces of a file were cut by the size that it had."""
        status = os.stat(self.shard.path)
        if (status.st_size, status.st_mtime_ns) != (self.shard.size, self.shard.modified):
            raise UserError(
                f"{self.shard.name} changed since this build looked at it",
                fix="run the same command again once nothing writes to it any more",
            )

    def _json_lines(self) -> Iterator[Item]:
        for raw in self._raw_lines():
            if not raw.strip():
                continue
            try:
                record = json.loads(self._decode(raw).removeprefix(MARK))
            except (ValueError, RecursionError) as error:
                yield self._reject(f"not JSON: {error}", raw)
            else:
                yield self._record(record, raw)

    def _json_values(self) -> Iterator[Item]:
        with self._open() as (file, stream):
            values = json_values(
                lambda count: read_all(stream, self.shard.name, count), self.shard.name, MAX_DOCUMENT_BYTES
            )
            for line, value, raw in values:
                self.lines = line
                self.consumed = min(self.shard.weight, file.tell())
                yield self._record(value, raw.encode(errors="replace"))

    def _csv(self, delimiter: str) -> Iterator[Item]:
        for row in csv_rows(self._marked_lines(), delimiter, self.shard.name, self.rule.fields):
            try:
                self._decode(row.raw)
            except Malformed as error:
                yield self._reject(str(error), row.raw, row.line)
                continue
            if row.fields is None:
                yield self._reject(row.why, row.raw, row.line)
            else:
                yield self._record(row.fields, row.raw, row.line)

    def _columnar(self) -> Iterator[Item]:
        shard = self.shard
        batches = columnar_rows(shard.kind, shard.path, shard.name, self.rule.fields, shard.start, shard.stop)
        for done, rows in batches:
            for row in rows:
                self.lines += 1
                if isinstance(row, UnicodeDecodeError):
                    yield self._reject(f"not UTF-8 at byte {row.start}: {row.reason}", row.object)
                else:
                    yield self._record(row, b"")
            self.consumed = shard.weight * done // max(1, shard.stop - shard.start)

    def _texts(self) -> Iterator[Item]:
        if self.text_document == "line":
            for raw in self._marked_lines():
                yield self._text(raw.rstrip(b"\r\n"))
        elif self.text_document == "file":
            with self._open() as (_, stream):
                raw = read_all(stream, self.shard.name, MAX_DOCUMENT_BYTES + 1)
            fix = "say what a document of a .txt file is: --text-document line, or --text-document blank"
            self._bounded(raw, "is one document", fix)
            self.lines = 1
            yield self._text(raw)
        elif self.text_document == "blank":
            yield from self._blocks()
        else:
            assert_never(self.text_document)

    def _blocks(self) -> Iterator[Item]:
        """Documents that blank lines divide."""
        block: list[bytes] = []
        first = 1
        for raw in self._marked_lines():
            if raw.strip():
                first = first if block else self.lines
                block.append(raw)
            elif block:
                yield self._text(b"".join(block).rstrip(b"\r\n"), first)
                block = []
        if block:
            yield self._text(b"".join(block).rstrip(b"\r\n"), first)

    def _bounded(self, raw: bytes, what: str, fix: str) -> None:
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise UserError(f"{self.shard.name} {what} of more than {MAX_DOCUMENT_BYTES >> 20} MiB", fix=fix)

    def _marked_lines(self) -> Iterator[bytes]:
        """Lines without the byte-order marks that files had which were joined into this one."""
        mark = MARK.encode()
        for raw in self._raw_lines():
            if self.lines == 1 and not raw.endswith(b"\n") and b"\r" in raw.rstrip(b"\r"):
                raise UserError(
                    f"{self.shard.name} ends its lines with carriage returns alone",
                    fix="give it line ends that are known: tr '\\r' '\\n' < FILE > OTHER",
                )
            yield raw.removeprefix(mark)

    def _raw_lines(self) -> Iterator[bytes]:
        shard = self.shard
        with self._open() as (file, stream):
            position = shard.start
            if shard.start:
                # The line that runs over the border belongs to the shard before.
                stream.seek(shard.start - 1)
                position += len(stream.readline()) - 1
            while shard.is_sequential or position < shard.stop:
                raw = read_line(stream, shard.name, MAX_DOCUMENT_BYTES + 1)
                if not raw:
                    break
                self._bounded(raw, "has a line", "one document a line is expected: check the format of the file")
                position += len(raw)
                self.lines += 1
                self.consumed = min(shard.weight, file.tell() if shard.is_sequential else position - shard.start)
                yield raw

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        shard = self.shard
        with open(shard.path, "rb") as raw:
            yield raw, as_utf8(open_stream(raw, shard.compression), shard.encoding, shard.name)

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            reason = f": {error.reason}" if self.shard.encoding == UTF_8 else ""
            raise Malformed(
                f"not {self.shard.encoding.upper()}: byte 0x{raw[error.start]:02x} at {error.start}{reason}"
            ) from error

    def _text(self, raw: bytes, line: int | None = None) -> Item:
        try:
            return Item(line or max(1, self.lines), checked_text(self._decode(raw)))
        except Malformed as error:
            return self._reject(str(error), raw, line)

    def _record(self, record: Any, raw: bytes, line: int | None = None) -> Item:
        if not isinstance(record, dict):
            return self._reject(f"not an object but {type(record).__name__}", raw, line)
        try:
            return Item(line or self.lines, self.rule.text(record))
        except Malformed as error:
            return self._reject(str(error), raw, line)

    def _reject(self, why: str, raw: bytes, line: int | None = None) -> Item:
        shown = raw.decode("utf-8", errors="backslashreplace").rstrip("\n")
        return Item(line or max(1, self.lines), None, why, shown)


def lines_before(shard: InputShard) -> int:
    """Lines or rows of the file that belong to the shards before this one."""
    if shard.start == 0:
        return 0
    if shard.kind in COLUMNAR:
        return rows_before(shard.kind, shard.path, shard.name, shard.start)
    count, left = 1, shard.start - 1
    with open(shard.path, "rb") as file:
        while left and (piece := file.read(min(left, 1 << 20))):
            count, left = count + piece.count(b"\n"), left - len(piece)
    return count

"""Records of CSV, TSV and JSON files that are no JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rewarm.data.encodings import MARK
from rewarm.errors import UserError

_FIRST_READ = 1 << 20
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Row:
    """A record as it stands in a file."""

    line: int
    """From 1."""
    raw: bytes
    fields: dict[str, str] | None
    why: str = ""
    """Why it is no record, where fields is None."""


def csv_rows(lines: Iterator[bytes], delimiter: str, name: str, wanted: tuple[str, ...]) -> Iterator[Row]:
    """The rows under the first line, which names the columns.

    In a file of one column nothing is separated, so that a comma there is text.

    Args:
        lines: UTF-8 with their ends, a byte-order mark taken off.
        delimiter: between the fields of a line.
        name: the file, for messages.
        wanted: the fields that will be asked for, possibly inside columns.

    Raises:
        UserError: if a wanted column is missing or there twice, or a quote is never closed.
    """
    header, raw = _header(lines, delimiter, name, wanted)
    taken: list[bytes] = []

    def texts() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line.decode(errors="surrogateescape")

    reader = csv.reader(texts(), delimiter=delimiter if len(header) > 1 else "\0", strict=True)
    while True:
        taken.clear()
        first = reader.line_num + 2  # after the header, and from 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise UserError(
                    f"{name}:{first}: a quote is opened and never closed",
                    fix='close it; a quote inside a field is doubled: "say ""hello"""',
                ) from error
            yield from (Row(first + place, line, None, f"no row: {error}") for place, line in enumerate(taken))
            continue
        raw = b"".join(taken)
        if len(row) == len(header):
            yield Row(first, raw, dict(zip(header, row, strict=True)))
        elif row:
            yield Row(first, raw, None, f"{len(row)} fields under {len(header)} columns: {delimiter!r} in a text needs "
                      "quotes around it")  # fmt: skip


def _header(lines: Iterator[bytes], delimiter: str, name: str, wanted: tuple[str, ...]) -> tuple[list[str], bytes]:
    raw = next(lines, b"")
    try:
        header = next(csv.reader([raw.decode()], delimiter=delimiter, strict=True), [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{name}:1: the names of the columns cannot be read: {error}", fix="mend the line") from error
    for field in wanted:
        column = field if field in header else field.partition(".")[0]
        if header.count(column) != 1:
            raise UserError(
                f"{name} has {'two columns' if column in header else 'no column'} {column!r}; its first line names "
                f"{header[:8]}, separated by {delimiter!r}",
                fix="name a column of it: --text-key COLUMN",
            )
    return header, raw


def json_values(read: Callable[[int], bytes], name: str, limit: int) -> Iterator[tuple[int, Any, str]]:
    """The values of a file one after another, or those of the one array that it is.

    Args:
        read: gives the next bytes of the file, UTF-8, at most that many.
        name: the file, for messages.
        limit: longest value, bytes.

    Yields:
        (line it begins in, the value, as it stands).

    Raises:
        UserError: where the file is not JSON.
    """
    text = _JsonText(read, name, limit)
    in_array = text.take_if("[")
    if in_array and text.take_if("]"):
        text.expect_end()
        return
    while in_array or text.peek():
        yield text.value()
        if in_array and not text.take_if(","):
            if not text.take_if("]"):
                raise text.error("there is neither a comma nor the end of the array")
            text.expect_end()
            return


class _JsonText:
    """A window over a JSON file that grows until a value fits."""

    def __init__(self, read: Callable[[int], bytes], name: str, limit: int) -> None:
        self._read, self._name, self._limit = read, name, limit
        self._decoder = json.JSONDecoder()
        self._rest = b""
        self._text, self._at, self._line = "", 0, 1
        self._ended = False
        self._grow(_FIRST_READ)
        self._text = self._text.removeprefix(MARK)

    def _grow(self, count: int) -> None:
        raw = self._read(count)
        self._ended = not raw
        raw = self._rest + raw
        # A character may be cut in two.
        cut = len(raw) if self._ended else _whole_characters(raw)
        try:
            added = raw[:cut].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8: {error.reason}", "name its encoding: --encoding NAME") from error
        self._rest = raw[cut:]
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + added, 0

    def peek(self) -> str:
        """The next letter that is no space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._grow(_FIRST_READ)

    def take_if(self, letter: str) -> bool:
        """Whether the next letter is this one, which is passed over then."""
        found = self.peek() == letter
        self._at += found
        return found

    def value(self) -> tuple[int, Any, str]:
        """The next value."""
        self.peek()
        while True:
            try:
                value, stop = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._ended or len(self._text) - self._at > self._limit:
                    raise self.error(getattr(error, "msg", str(error))) from error
            else:
                # A number may go on behind the window.
                if self._ended or stop < len(self._text):
                    place = self._line + self._text.count("\n", 0, self._at)
                    raw, self._at = self._text[self._at : stop], stop
                    return place, value, raw
            self._grow(max(_FIRST_READ, len(self._text) - self._at))

    def expect_end(self) -> None:
        """Refuse anything behind the array."""
        if self.peek():
            raise self.error("there is more behind the end of the array")

    def error(self, why: str, fix: str = "mend it, or write one object a line and name it .jsonl") -> UserError:
        """What is said of the place in hand."""
        line = self._line + self._text.count("\n", 0, self._at)
        return UserError(f"{self._name}:{line}: not JSON: {why}", fix=fix)


def _whole_characters(raw: bytes) -> int:
    """Bytes up to the last character that is whole, if the rest can be the beginning of one."""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte & 0xC0 == 0x80:
            continue
        length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return len(raw) - back if length > back else len(raw)
    return len(raw)

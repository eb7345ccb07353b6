"""The text of a record: one field of it, or several in a template."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rewarm.data.encodings import MARK
from rewarm.errors import UserError

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


class Malformed(ValueError):
    """A record holds no text, and why."""


@dataclass(frozen=True)
class TextRule:
    """What of a record is its text."""

    key: str = "text"
    """A field; ``content.text`` is the field text inside content, unless a field has that very name."""
    template: str | None = None
    """A text with fields in braces, which takes the place of the key."""

    @cached_property
    def _pieces(self) -> list[tuple[str, str | None]]:
        """(literal, field after it) of the template."""
        return parse_template(self.template) if self.template is not None else []

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """All fields that are read, each once."""
        if self.template is None:
            return (self.key,)
        return tuple(dict.fromkeys(field for _, field in self._pieces if field is not None))

    def text(self, record: Mapping[str, Any]) -> str:
        """The text of a record.

        Raises:
            Malformed: if a field is missing or is no text, or the text has characters that are none.
        """
        if self.template is None:
            value = look_up(record, self.key)
            if not isinstance(value, str):
                raise Malformed(f"{self.key!r} is not a text but {type(value).__name__}")
            return checked_text(value)
        pieces = []
        for literal, field in self._pieces:
            pieces.append(literal)
            if field is not None:
                pieces.append(_as_text(field, look_up(record, field)))
        return checked_text("".join(pieces))


def parse_template(template: str) -> list[tuple[str, str | None]]:
    r"""The (literal, field) pairs of a template such as ``Question: {question}\nAnswer: {answer}``.

    Raises:
        UserError: if it has no field, or its braces are not those of fields.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"--text-template {template!r}: {error}", fix="write {{ and }} for plain braces") from error
    pieces: list[tuple[str, str | None]] = []
    for literal, field, layout, conversion in parsed:
        if field == "" or layout or conversion:
            raise UserError(
                f"--text-template {template!r}: a field is a name in braces and nothing else",
                fix="write for example {question}, and {{ and }} for plain braces",
            )
        pieces.append((_unescaped(literal), field))
    if not any(field for _, field in pieces):
        raise UserError(
            f"--text-template {template!r} names no field", fix="name one in braces, for example {question}"
        )
    return pieces


def _unescaped(literal: str) -> str:
    r"""A shell passes ``\n`` on as two letters."""
    pieces, letters = [], iter(literal)
    for letter in letters:
        if letter == "\\":
            following = next(letters, "")
            letter = _ESCAPES.get(following, "\\" + following)
        pieces.append(letter)
    return "".join(pieces)


def _as_text(field: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise Malformed(f"{field!r} is neither a text nor a number but {type(value).__name__}")


def look_up(record: Mapping[str, Any], path: str) -> Any:
    """The value of a field, or of a field inside others.

    Raises:
        Malformed: if there is none.
    """
    if path in record:
        return record[path]
    value: Any = record
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            has = f"; it has {sorted(map(str, record))[:8]}"
            raise Malformed(f"no key {path!r}{has}")
    return value


def checked_text(text: str) -> str:
    """A text without the byte-order mark that a careless tool left at its start.

    Raises:
        Malformed: for characters that no text holds: NUL, and halves of pairs.
    """
    if "\0" in text:
        raise Malformed(f"holds a NUL at character {text.index(chr(0))}: binary, or of another encoding")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"holds half a surrogate pair at character {error.start}") from error
    return text.removeprefix(MARK)

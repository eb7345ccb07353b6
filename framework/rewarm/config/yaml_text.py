"""YAML as configurations are written in: nothing is guessed, nothing is dropped, nothing is without bound.

Plain words are read as YAML 1.2 does, with the numbers that this field writes (``3e-4``, ``1_000``): ``no``, ``on``,
``010`` and ``2024-01-01`` are text. A key is always text. A key that is written twice is refused, since every other
reading of it drops a setting without a word.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rewarm.errors import UserError

MOST_BYTES = 4 << 20
"""Size of a configuration file; one of a thousand domains has a twentieth of it."""
MOST_DEPTH = 32
"""Nested lists and mappings."""
MOST_VALUES = 200_000
"""Values and keys, those that aliases repeat included."""
MOST_CHARACTERS = 80
"""Characters of an integer, underscores included."""

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?)$"
)
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{f"{sign}.{word}": float(f"{sign}{word}") for sign in ("", "-", "+") for word in ("inf", "Inf", "INF")},
    **{f".{word}": float("nan") for word in ("nan", "NaN", "NAN")},
}
_TEXT_TAGS = (None, "!", "tag:yaml.org,2002:str")


class DuplicateKey(ValueError):
    """A key that a mapping has twice."""


def read_yaml(path: str | Path, what: str = "configuration") -> Any:
    """The value that a YAML file holds; None for an empty one.

    Args:
        path: the file.
        what: what a message calls it.

    Raises:
        UserError: if it cannot be read, is too large, is not UTF-8 or is not YAML, or a key stands twice in it.
    """
    text = _read_text(path, what)
    try:
        return parse_yaml(text)
    except DuplicateKey as error:
        raise UserError(f"{path}: {error}", fix="remove one of the two") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}", fix="mend the file at that place") from error


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UserError: as :func:`read_yaml`, and if the file holds something else.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not a mapping of settings")
    return values


def _read_text(path: str | Path, what: str) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}", fix="check the path") from error
    except ValueError as error:  # a path that holds a zero byte
        raise UserError(f"cannot read the {what} {str(path)!r}: {error}", fix="check the path") from error
    if len(raw) > MOST_BYTES:
        raise UserError(
            f"{path} has more than {MOST_BYTES >> 20} MiB, which no {what} has",
            fix="check that this is the file you mean",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else None
        line = raw.count(b"\n", 0, error.start) + 1
        where = f"it seems to be {guess}" if guess else f"line {line} holds the byte 0x{raw[error.start]:02x}"
        raise UserError(f"{path} is not UTF-8: {where}", fix="save it as UTF-8") from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML text of one document; None for an empty one.

    Raises:
        DuplicateKey: naming the key and its lines.
        ValueError: naming the line and what is wrong there.
    """
    try:
        return _Builder(yaml.parse(text, Loader=_PARSER)).document()
    except yaml.MarkedYAMLError as error:
        problem = error.problem or error.context or "cannot be read"
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{where}{problem}{_advice(problem)}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} is half of a character, which UTF-8 cannot hold") from error


def _advice(problem: str) -> str:
    if "\\t" in problem or "'\t'" in problem or "tab" in problem or "cannot start any token" in problem:
        return " (indent with spaces, not tabs, and put text that begins with a sign in quotes)"
    return " (put text that holds ': ' in quotes)" if "mapping values are not allowed" in problem else ""


class _Builder:
    """Turns the events of a parser into plain values, one pass, without ever holding more than the bounds allow."""

    def __init__(self, events: Iterator[Any]) -> None:
        self._events = events
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._open: set[str] = set()
        self._count = 0

    def document(self) -> Any:
        """The only document of the text."""
        value, documents = None, 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise ValueError(f"line {_line(event)}: a second document begins; a file holds one")
                value = self._value(next(self._events), 0)
        return value

    def _value(self, event: Any, depth: int) -> Any:
        line = _line(event)
        if depth > MOST_DEPTH:
            raise ValueError(f"line {line}: nested more than {MOST_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            return self._repeated(str(event.anchor), line)
        anchor, before = event.anchor, self._count
        if anchor is not None:
            if anchor in self._anchors or anchor in self._open:
                raise ValueError(f"line {line}: the anchor &{anchor} is there already")
            self._open.add(anchor)
        self._add(1, line)
        if isinstance(event, yaml.ScalarEvent):
            value: Any = _scalar(event)
        elif event.tag not in (None, "!"):
            raise ValueError(f"line {line}: the tag {_shown_tag(event.tag)} is not used here; remove it")
        elif isinstance(event, yaml.SequenceStartEvent):
            value = [self._value(item, depth + 1) for item in self._until(yaml.SequenceEndEvent)]
        else:
            value = self._mapping(depth)
        if anchor is not None:
            self._open.remove(anchor)
            self._anchors[anchor] = (value, self._count - before)
        return value

    def _until(self, end: type) -> Iterator[Any]:
        for event in self._events:
            if isinstance(event, end):
                return
            yield event

    def _mapping(self, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for event in self._until(yaml.MappingEndEvent):
            line = _line(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise ValueError(f"line {line}: a key must be a name, not a list, a mapping or an alias")
            if event.tag not in _TEXT_TAGS:
                raise ValueError(f"line {line}: the tag {_shown_tag(event.tag)} is not used here; remove it")
            if event.anchor is not None:
                raise ValueError(f"line {line}: the anchor &{event.anchor} stands at a key; put it at a value")
            self._add(1, line)
            key = event.value
            if key in lines:
                where = f"in line {line}" if lines[key] == line else f"in lines {lines[key]} and {line}"
                raise DuplicateKey(f"the key {_shown(key)} stands twice, {where}")
            lines[key] = line
            value = self._value(next(self._events), depth + 1)
            if key == "<<" and event.implicit[0]:
                merged = _merge(value, line)
            else:
                own[key] = value
        return {**merged, **own}

    def _repeated(self, anchor: str, line: int) -> Any:
        if anchor in self._open:
            raise ValueError(f"line {line}: the alias *{anchor} stands inside what it names")
        if anchor not in self._anchors:
            raise ValueError(f"line {line}: the alias *{anchor} names no anchor")
        value, size = self._anchors[anchor]
        self._add(size, line)
        return copy.deepcopy(value)  # of its own, so that an override changes one place

    def _add(self, count: int, line: int) -> None:
        self._count += count
        if self._count > MOST_VALUES:
            raise ValueError(f"line {line}: more than {MOST_VALUES:,} values, which no configuration has")


def _merge(value: Any, line: int) -> dict[str, Any]:
    """What a merge key adds; of several mappings the first that has a key decides it, as YAML defines."""
    mappings = value if isinstance(value, list) else [value]
    if not all(isinstance(mapping, dict) for mapping in mappings):
        raise ValueError(f"line {line}: << merges mappings, and nothing else")
    return {key: inner for mapping in reversed(mappings) for key, inner in mapping.items()}


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _scalar(event: Any) -> Any:
    text, line = event.value, _line(event)
    if event.tag not in _TEXT_TAGS:
        raise ValueError(f"line {line}: the tag {_shown_tag(event.tag)} is not used here; remove it")
    if event.tag is not None or not event.implicit[0]:
        return text
    try:
        return _plain(text)
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from error


def _plain(text: str) -> Any:
    """What a word without quotes stands for."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.match(text) or _HEXADECIMAL.match(text):
        number = int(text[:MOST_CHARACTERS].replace("_", ""), 0)
        if len(text) > MOST_CHARACTERS or not -(2**63) <= number < 2**64:
            raise ValueError(f"the number {_shown(text)} does not fit 64 bits")
        return number
    return float(text.replace("_", "")) if _FLOAT.match(text) else text


def dump_yaml(values: Any) -> str:
    """A value as YAML that :func:`parse_yaml` reads back as it is, and readers of YAML 1.1 too."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as something else."""


def _quoted(dumper: _Dumper, text: str) -> yaml.Node:
    is_other = text == "<<" or len(text) > MOST_CHARACTERS or not isinstance(_plain(text), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if is_other else None)


_Dumper.add_representer(str, _quoted)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _shown_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")

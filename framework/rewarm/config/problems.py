"""What a person reads of a configuration that is refused."""

from __future__ import annotations

import datetime
import reprlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

from pydantic import BaseModel, ValidationError

from rewarm.config.run import run_schema
from rewarm.config.section import alternatives
from rewarm.config.yaml_text import MOST_DEPTH
from rewarm.errors import nearest

_MAPPING_WANTED = ("model_type", "model_attributes_type", "dict_type")


def explain(error: ValidationError) -> list[str]:
    """One line for each problem, all unknown settings among them."""
    lines: list[str] = []
    last = None
    for problem in _relevant(error.errors(include_url=False)):
        location = clean(problem["loc"])
        if location and location == last:  # the alternatives of one setting each say what they want
            lines[-1] += f"; or {_message(location, problem)}"
        else:
            lines.append(_explain(location, problem))
        last = location
    return lines


def _relevant(problems: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Leave out what an alternative of another kind than the given value would have wanted."""
    kept = []
    for problem in problems:
        start = problem["loc"][:-1]
        others = [p for p in problems if p is not problem and p["loc"][: len(start)] == start and start]
        of_other_kind = (problem["type"] == "string_type" and isinstance(problem["input"], dict)) or (
            problem["type"] == "dict_type" and isinstance(problem["input"], str)
        )
        if not (of_other_kind and others and _is_choice(annotation_at(clean(start)))):
            kept.append(problem)
    return kept


def _explain(location: list[str], problem: Mapping[str, Any]) -> str:
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {where}; {_hint(location)}"
    message = _message(location, problem)
    if problem["type"] == "missing":
        return f"{where} is required"
    if not where or message.startswith(f"{where}."):
        return message
    value = problem["input"]
    shown = "" if isinstance(value, dict | list) or value is None else f" (given: {short(value)})"
    return f"{where}: {message}{shown}"


def _message(location: list[str], problem: Mapping[str, Any]) -> str:
    value = problem["input"]
    if problem["type"] in _MAPPING_WANTED:
        if location[:1] == ["data"] and len(location) == 2:
            return "a domain is its path, or a mapping with path and more settings"
        return "a mapping of settings is wanted here"
    if problem["type"] == "string_type" and isinstance(value, int | float):
        return "text is wanted here: put it in quotes"
    return str(problem["msg"]).removeprefix("Value error, ")


def _hint(location: list[str]) -> str:
    if "." in location[-1]:
        return "dots belong on the command line; in a file write a mapping inside a mapping"
    known = known_keys(location[:-1])
    guess = nearest(location[-1], known)
    if guess:
        return f"did you mean {'.'.join([*location[:-1], guess])}?"
    return f"known here: {', '.join(known)}"


def short(value: Any) -> str:
    """A value as a message shows it, however long it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
        return f"a number of {value.bit_length()} bits"
    viewer = reprlib.Repr()
    viewer.maxstring = viewer.maxother = 80
    return viewer.repr(value)


def clean(location: Sequence[int | str]) -> list[str]:
    """The keys of a problem's place, without pydantic's marks for the alternative that was tried."""
    kept: list[str] = []
    is_mark = False
    for part in location:
        if is_mark:
            is_mark = False
            continue
        if part == "[key]":
            continue
        kept.append(str(part))
        is_mark = _is_choice(annotation_at(kept))
    return kept


def annotation_at(location: Sequence[str]) -> Any:
    """The type of a setting, None where there is none of that name; dictionary and list levels are passed through."""
    current: Any = run_schema()
    for part in location:
        section = next((a for a in alternatives(current) if _is_section(a)), None)
        if section is not None:
            if part not in section.model_fields:
                return None
            current = section.model_fields[part].annotation
            continue
        inner = [typing.get_args(a)[-1] for a in alternatives(current) if typing.get_origin(a) in (dict, list)]
        if not inner:
            return None
        current = inner[0]
    return current


def known_keys(location: Sequence[str]) -> list[str]:
    """Field names of the section at a path of keys."""
    section = next((a for a in alternatives(annotation_at(location)) if _is_section(a)), None)
    return sorted(section.model_fields) if section is not None else []


def is_named(location: Sequence[str]) -> bool:
    """Whether a place holds entries whose names the user chose."""
    return any(typing.get_origin(a) is dict for a in alternatives(annotation_at(location)))


def _is_choice(annotation: Any) -> bool:
    return sum(member is not NoneType for member in alternatives(annotation)) > 1


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def odd_values(values: Any, where: str = "", depth: int = 0) -> Iterator[str]:
    """What of a nested value no configuration can hold: dates, numbers without bound, half characters."""
    place = f"{where}: " if where else ""
    if depth > MOST_DEPTH:
        yield f"{place}nested more than {MOST_DEPTH} levels deep"
    elif isinstance(values, Mapping):
        for key, value in values.items():
            if isinstance(key, str):
                yield from odd_values(key, where, depth)
                yield from odd_values(value, f"{where}.{key}" if where else key, depth + 1)
            else:
                yield f"{place}the key {short(key)} is no text: put it in quotes"
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from odd_values(value, f"{where}.{index}", depth + 1)
    elif isinstance(values, str):
        if not values.isascii() and any(0xD800 <= ord(letter) < 0xE000 for letter in values):
            yield f"{place}{short(values)} is not UTF-8"
        elif "\0" in values:
            yield f"{place}{short(values)} holds a zero byte"
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        yield f"{place}{short(values)} does not fit 64 bits"
    elif isinstance(values, datetime.date | datetime.time):
        yield f"{place}a date is no value of any setting: put {values} in quotes if it is a name"
    elif not (values is None or isinstance(values, int | float | BaseModel)):
        yield f"{place}a {type(values).__name__} is no value of any setting"

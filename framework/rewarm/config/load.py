"""YAML and dot overrides to a checked :class:`~rewarm.config.run.RunConfig`."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rewarm.config.run import RunConfig
from rewarm.errors import UserError, nearest


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-4 as text; numbers are written that way everywhere in this field."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?[0-9][0-9_]*\.[0-9_]*$|^[-+]?\.(?:inf|nan)$"),
    list("-+0123456789."),
)


def load(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a stage from a YAML file.

    Args:
        path: the file.
        overrides: ``a.b.c=value`` strings; values are read as YAML.

    Raises:
        UserError: if the file cannot be read, a key is unknown (naming the nearest known one) or a value is refused.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}", fix="check the path") from error
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}", fix="mend the file at that place") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not a mapping of settings")
    for override in overrides:
        apply_override(values, override)
    return build(values, source=str(path))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b.c=value`` in a nested mapping, in place."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(
            f"override {override!r} is not of the form a.b.c=value", fix="write for example schedule.peak=1e-4"
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = str(error).splitlines()[0]
        raise UserError(
            f"override {override!r}: the value is not valid YAML ({problem})",
            fix="quote it for the shell when it has spaces or brackets: 'duration=200 steps'",
        ) from error
    place = values
    for part in parts[:-1]:
        inner = place.get(part)
        if inner is None:
            inner = place[part] = {}
        elif isinstance(inner, str) and place is values.get("data"):
            inner = place[part] = {"path": inner}
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {part} holds {inner!r}, which has no settings inside")
        place = inner
    place[parts[-1]] = value


def build(values: Mapping[str, Any], *, source: str = "configuration") -> RunConfig:
    """Check a nested mapping and fill in every default.

    Raises:
        UserError: one message that lists every problem.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        message = "\n  ".join(["", *lines]) if len(lines) > 1 else lines[0]
        raise UserError(f"{source}: {message}", fix="rewarm config reference explains every setting") from error


def _explain(problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        guess = nearest(location[-1], known)
        hint = f"did you mean {'.'.join([*location[:-1], guess])}?" if guess else f"known here: {', '.join(known)}"
        return f"unknown setting {where}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{where} is required"
    if not where:
        return message
    shown = "" if isinstance(problem["input"], dict | list) else f" (given: {problem['input']!r})"
    return f"{where}: {message}{shown}"


def _known_keys(location: list[str]) -> list[str]:
    """Field names of the section at a path of keys; dictionary levels are passed through."""
    section: Any = RunConfig
    for part in location:
        section = section.model_fields[part].annotation if _is_section(section) else _inner(section)
        section = _strip(section)
    return sorted(section.model_fields) if _is_section(section) else []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _inner(annotation: Any) -> Any:
    arguments = typing.get_args(annotation)
    return arguments[-1] if arguments else annotation


def _strip(annotation: Any) -> Any:
    """The section inside an optional annotation."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next((a for a in typing.get_args(annotation) if a is not type(None)), annotation)
    return annotation


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML, with every default filled in."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

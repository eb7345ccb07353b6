"""YAML and dot overrides to a checked :class:`~rewarm.config.run.RunConfig`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rewarm.config.extensions import import_extensions
from rewarm.config.problems import explain, is_named, odd_values, short
from rewarm.config.run import RunConfig, run_schema
from rewarm.config.yaml_text import DuplicateKey, dump_yaml, parse_yaml, read_mapping
from rewarm.errors import UserError

_MOST_ODD_VALUES = 20
"""Values that no setting can have, of those that a message lists."""
_LONGEST_LINE = 1000
"""Characters of one problem in a message."""


def load(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a stage from a YAML file.

    Args:
        path: the file.
        overrides: ``a.b.c=value`` strings; values are read as YAML.

    Raises:
        UserError: if the file cannot be read, a key is unknown (naming the nearest known one) or a value is refused.
    """
    values = read_mapping(path)
    trusts = _take_trust(values)
    apply_overrides(values, overrides)
    if trusts and _TRUST not in (values.get("deepspeed") or {}):
        raise UserError(
            f"{path} says deepspeed.{_TRUST}=true, and trust in a model's Python files is not taken from a file",
            fix=f"read them, then say so on the command line: deepspeed.{_TRUST}=true",
        )
    return build(values, source=str(path))


_TRUST = "trust_remote_code"


def _take_trust(values: dict[str, Any]) -> bool:
    """Take the trust that a file gives out of its values: it is for the one to give who runs it, since files come
    from anywhere. True if there was some, in whatever words."""
    section = values.get("deepspeed")
    if not isinstance(section, dict) or section.get(_TRUST) in (None, False):
        return False
    values["deepspeed"] = {key: value for key, value in section.items() if key != _TRUST}
    return True


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> None:
    """Apply several ``a.b.c=value``, in place and in order.

    Raises:
        UserError: if one is malformed, or undoes what another one says.
    """
    given: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        for other, text in given.items():
            if text != override and (other + ".").startswith(key + "."):
                raise UserError(f"override {override!r} undoes {text!r}", fix="give each setting once")
        given[key] = override
        apply_override(values, override)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b.c=value`` in a nested mapping, in place. Null takes an entry out of a mapping of names.

    Raises:
        UserError: if it is malformed, or leads through a value that has no settings inside.
    """
    key, separator, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise UserError(
            f"override {short(override)} is not of the form a.b.c=value", fix="write for example schedule.peak=1e-4"
        )
    value = _override_value(override, text)
    place = values
    for depth, part in enumerate(parts[:-1]):
        inner = place.get(part)
        if inner is None:
            inner = place[part] = {}
        elif isinstance(inner, str) and parts[:depth] == ["data"]:
            inner = place[part] = {"path": inner}
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {part} holds {short(inner)}, which has no settings inside")
        place = inner
    if value is None and is_named(parts[:-1]):
        place.pop(parts[-1], None)
    else:
        place[parts[-1]] = value


def _override_value(override: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except DuplicateKey as error:
        raise UserError(f"override {override!r}: {error}", fix="remove one of the two") from error
    except ValueError as error:
        raise UserError(
            f"override {short(override)}: the value is not valid YAML ({error})",
            fix="quote it for the shell when it has spaces or brackets: 'duration=200 steps'",
        ) from error


def build(values: Mapping[str, Any], *, source: str = "configuration") -> RunConfig:
    """Check a nested mapping and fill in every default.

    Raises:
        UserError: one message that lists every problem.
    """
    import_extensions(_extensions(values))
    lines = list(islice(odd_values(values), _MOST_ODD_VALUES))
    try:
        if not lines:
            return run_schema().model_validate(dict(values))
    except ValidationError as error:
        lines = explain(error)
    lines = [_printable(line) for line in lines]
    message = "\n  ".join(["", *lines]) if len(lines) > 1 else lines[0]
    raise UserError(f"{source}: {message}", fix="rewarm config reference explains every setting")


def _printable(line: str) -> str:
    """A problem as a terminal can show it: whole characters, and not a page of them."""
    line = line.encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 2]} … {line[-_LONGEST_LINE // 2 :]}"


def _extensions(values: Mapping[str, Any]) -> list[str]:
    """The names of the extensions; what is no list of names is left to the schema to refuse."""
    given = values.get("extensions") or []
    names = [given] if isinstance(given, str) else given
    return [name for name in names if isinstance(name, str)] if isinstance(names, list | dict) else []


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML, with every default filled in."""
    return dump_yaml(config.model_dump(mode="json"))

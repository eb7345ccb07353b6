"""JSON files that people write: a key that stands twice is refused."""

from __future__ import annotations

import json
from typing import Any

from rewarm.config.yaml_text import DuplicateKey, parse_yaml


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        DuplicateKey: naming the key, and its lines where they can be found.
        ValueError: if it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except DuplicateKey:
        _name_lines(text)
        raise
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise DuplicateKey(f"the key {key!r} stands twice")
        values[key] = value
    return values


def _name_lines(text: str) -> None:
    """Raise the same error with lines: JSON is YAML too, whose parser knows them."""
    try:
        parse_yaml(text.replace("\t", " "))
    except DuplicateKey:
        raise
    except ValueError:
        return

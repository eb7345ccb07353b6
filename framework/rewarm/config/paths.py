"""Settings that are paths: ``~`` and ``$VARIABLE`` stand for what they stand for in a shell, or are refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)

MOST_CHARACTERS = 4096
"""Longest path of Linux."""


def expand_path(text: str) -> str:
    """A path with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced, as it is written into the resolved
    configuration, so that a job elsewhere means the same place.

    Raises:
        ValueError: if a variable or a user is not known, or the path is one that no shell and no log can show.
    """
    if not text.strip():
        raise ValueError("the path is empty; null means none")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a path of {len(text):,} characters is longer than any file system takes")
    if not text.isprintable():
        raise ValueError(f"the path {text!r} holds a line break or another character that cannot be printed")
    path = _VARIABLE.sub(lambda match: _value(match, text), text)
    if path.startswith("~"):
        try:
            path = str(Path(path).expanduser())
        except RuntimeError:
            raise ValueError(
                f"{text!r}: there is no home folder for {path.split('/')[0]}; write the whole path, or ./ in front if "
                "the folder is called so"
            ) from None
    return path


def _value(match: re.Match[str], text: str) -> str:
    name = match[1] if match[1] is not None else match[2]
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(f"{text!r}: {match[0]} is no name of an environment variable")
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(f"{text!r}: the environment variable {name} is not set; set it, or write the path in full")
    if not value.isprintable() or "$" in value:
        raise ValueError(f"{text!r}: the environment variable {name} holds {value!r}, which is no plain path")
    return value


PathText = Annotated[str, AfterValidator(expand_path)]
"""A path, relative to the working directory unless it is absolute."""

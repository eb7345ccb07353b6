"""The ``config.yaml`` that a run keeps in its folder, read by whoever comes later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewarm.config.yaml_text import read_yaml
from rewarm.errors import UserError

FILE_NAME = "config.yaml"
_FIX = "restore it from a copy of the run, or from the configuration that the run was started with"


def read_saved(run: Path) -> dict[str, Any]:
    """The settings of a run, as they were written.

    Args:
        run: the run folder.

    Raises:
        UserError: if the file is missing or damaged.
    """
    place = run / FILE_NAME
    try:
        values = read_yaml(place)
    except UserError as error:
        raise UserError(f"{place} is damaged: {error.message}", fix=_FIX) from error
    if not isinstance(values, dict):
        raise UserError(f"{place} is damaged: it holds no settings by name", fix=_FIX)
    return values


def saved_setting(run: Path, key: str) -> Any:
    """One setting of a run, ``a.b.c``.

    Raises:
        UserError: if the file is missing or damaged, or lacks the setting.
    """
    value: Any = read_saved(run)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"{run / FILE_NAME} is damaged: it has no {key}", fix=_FIX)
        value = value[part]
    return value

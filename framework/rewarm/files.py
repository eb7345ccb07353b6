"""Small files that decide something: written whole and kept through a power failure, read with a clear error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rewarm.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file: whoever reads sees the old one or the new one, also after a power failure.

    Raises:
        OSError: if it cannot be written; the old file stays.
    """
    aside = path.with_name(f".{path.name}.new")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: a synced file is lost if its name is not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path: the file.
        fix: what to do if it is damaged.

    Raises:
        UserError: if it is missing, cannot be read, or holds no JSON object.
    """
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", fix=fix) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}", fix=fix) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds {type(value).__name__} instead of an object", fix=fix)
    return value


def parse_json(content: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is no JSON in UTF-8, or nested beyond reading.
    """
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None

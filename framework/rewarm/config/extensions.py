"""Methods of the user's own: modules that register mixers and the like, named by ``extensions`` in a stage."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from rewarm.errors import UserError


def import_extensions(modules: Iterable[str]) -> None:
    """Import modules, so that what they register can be chosen. They are looked for in the working directory, too.

    Raises:
        UserError: if one cannot be found or imported.
    """
    for module in modules:
        _file_of(module)
        try:
            importlib.import_module(module)
        except Exception as error:
            raise UserError(
                f"extensions: importing {module} failed: {type(error).__name__}: {error}",
                fix="run: python -c 'import " + module + "'",
            ) from error


def digest_of(module: str) -> str:
    """SHA-256 of a module's file, in hexadecimal: what the resolved configuration keeps of it.

    Raises:
        UserError: if it cannot be found.
    """
    return hashlib.sha256(_file_of(module).read_bytes()).hexdigest()


def _file_of(module: str) -> Path:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(
            f"extensions: there is no module {module}",
            fix="start rewarm where its file is, or put its folder on PYTHONPATH; name it as in an import",
        )
    return Path(spec.origin)

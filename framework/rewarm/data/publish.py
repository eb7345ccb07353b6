"""The result of a build takes the place of what stands in the domain folder: the old one stays until the new is whole.

The new files are complete on disk before the first old one moves. Each step is a rename inside one folder, and what an
interruption leaves half done is undone, at once or by the next build.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from rewarm.data.assemble import REJECTS_FILE
from rewarm.data.domain import DOMAIN_FILE

RESULT_FOLDER = "result"
_OLD_FOLDER = "old"
# domain.json leaves first and comes last, so that it never speaks for a mixture of two builds.
_FILES = ("train.bin", "train.idx", "held_out.bin", "held_out.idx", REJECTS_FILE, DOMAIN_FILE)


def publish(output: Path, work: Path) -> None:
    """Move the files of the result into the domain folder, and those that were there out of it.

    Args:
        output: the domain folder.
        work: a folder inside it, with the result in :data:`RESULT_FOLDER`.
    """
    result, old = work / RESULT_FOLDER, work / _OLD_FOLDER
    old.mkdir(exist_ok=True)
    moved: list[str] = []
    try:
        for name in reversed(_FILES):
            _move(output / name, old / name)
        for name in _FILES:
            _move(result / name, output / name)
            moved.append(name)
        _sync(output)
    except BaseException:
        for name in moved:
            _move(output / name, result / name)
        undo(output, work)
        raise


def undo(output: Path, work: Path) -> None:
    """Bring back the files of a domain that an interrupted exchange put aside."""
    old = work / _OLD_FOLDER
    if not old.is_dir() or (output / DOMAIN_FILE).exists():
        return
    for name in _FILES:
        _move(old / name, output / name)
    with contextlib.suppress(OSError):
        old.rmdir()


def _move(source: Path, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.replace(source, target)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

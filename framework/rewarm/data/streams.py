"""Standard input and pipes, put down as files so that a build can go on after a stop."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import IO

from rewarm.data.inputs import STANDARD_INPUT
from rewarm.errors import UserError

_PIECE = 1 << 20


def take_streams(given: list[str], folder: Path) -> dict[str, Path]:
    """Copy what comes in through each stream to a file that is named by its content.

    Args:
        given: ``-``, or names of pipes.
        folder: where the files go.

    Returns:
        The file of each.

    Raises:
        UserError: if standard input is a terminal.
    """
    taken = {}
    for name in given:
        if name == STANDARD_INPUT:
            if sys.stdin.isatty():
                raise UserError("standard input is a terminal", fix="pipe the text in: command | rewarm data build - …")
            taken[name] = _take(sys.stdin.buffer, folder)
        else:
            with open(name, "rb") as stream:
                taken[name] = _take(stream, folder)
    return taken


def _take(stream: IO[bytes], folder: Path) -> Path:
    digest = hashlib.blake2b(digest_size=12)
    aside = folder / "stream.partial"
    with open(aside, "wb") as file:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            file.write(piece)
    path = folder / f"stream-{digest.hexdigest()}"
    os.replace(aside, path)
    # Parts are known by the time of the file that they were made of; this one's content is in its name.
    os.utime(path, ns=(0, 0))
    return path

"""Output that outlives its terminal: a run goes on when nobody can read what it prints. No torch."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger(__name__)


class _LastingFile(io.RawIOBase):
    """A file descriptor that takes whatever it is given. What cannot be written (the pipe's reader ended, the terminal
    is gone, the disk of the log is full) is dropped; the first time is noted in the rank's log."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._failed = descriptor, False

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.write(self._descriptor, view[done:])
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("output on descriptor %d is lost from here on: %s", self._descriptor, error)
        return len(view)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def keep_going_without_terminal() -> None:
    """Let no error of standard output or standard error reach who prints, from here to the end of the process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or isinstance(stream.buffer, io.BytesIO):
            continue  # captured, or closed by the caller
        stream.flush()
        file = _LastingFile(stream.fileno())
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                # Python's own choice under -u.
                file if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(file),  # type: ignore[arg-type]
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            ),
        )

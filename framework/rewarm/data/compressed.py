"""Byte streams of plain, gzip and Zstandard files that never take a cut-off file for a whole one."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import IO, Any, cast

from rewarm.errors import UserError

_CHUNK = 1 << 20


def is_compressed(path: str) -> bool:
    """Whether a file of this name can only be read from its start."""
    return path.lower().endswith((".gz", ".zst"))


def open_stream(raw: IO[bytes], path: str) -> IO[bytes]:
    """The plain bytes of an open file, decompressed as its name asks."""
    if path.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if path.lower().endswith(".zst"):
        return io.BufferedReader(_ZstandardStream(raw), _CHUNK)
    return raw


def read_line(stream: IO[bytes], path: str, limit: int) -> bytes:
    """The next line with its end, at most ``limit`` bytes of it; empty at the end of the file.

    Raises:
        UserError: if the compressed file is damaged or ends before its stream does.
    """
    try:
        return stream.readline(limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error


def read_all(stream: IO[bytes], path: str, limit: int) -> bytes:
    """What is left of the file, at most ``limit`` bytes; raises as :func:`read_line` does."""
    try:
        return stream.read(limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path} is damaged or cut short: {error}",
        fix="copy it again from its source, then run the same command: what is done is kept",
    )


class _ZstandardStream(io.RawIOBase):
    """All frames of a Zstandard file. The library's own stream reader ends quietly in the middle of a frame."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw = raw
        self._library = zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fresh = True
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """True: this is an input."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer with plain bytes; 0 at the end of the last frame."""
        target = memoryview(buffer).cast("B")
        while not self._ready:
            if not self._advance():
                return 0
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _advance(self) -> bool:
        compressed = self._frame.unused_data if self._frame.eof else b""
        compressed = compressed or self._raw.read(_CHUNK // 8)
        if not compressed:
            if not (self._fresh or self._frame.eof):
                raise EOFError("the last frame has no end")
            return False
        if self._frame.eof:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        self._fresh = False
        try:
            self._ready = memoryview(self._frame.decompress(compressed))
        except self._library.ZstdError as error:
            raise EOFError(str(error)) from error
        return True

"""Byte streams of plain and compressed files that never take a cut-off file for a whole one.

What a file is compressed with is read off its first bytes: names lie, and files of a download cache have none.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from typing import IO, Any, Literal, assert_never, cast

from rewarm.errors import UserError

Compression = Literal["", "gzip", "zstd", "bzip2", "xz"]
COMPRESSED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
_CHUNK = 1 << 20
_MAGIC: tuple[tuple[re.Pattern[bytes], Compression], ...] = (
    (re.compile(rb"\x1f\x8b\x08"), "gzip"),
    # The second form is a frame without content, which some writers begin or end with.
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), "zstd"),
    (re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), "bzip2"),
    (re.compile(rb"\xfd7zXZ\x00"), "xz"),
)
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"\x04\x22\x4d\x18", "compressed with lz4"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed with snappy"),
    (b"\x1f\x9d", "compressed with compress"),
    (b"\x89LZO\x00", "compressed with lzop"),
)
MAGIC_BYTES = 16
"""Bytes of a file's beginning that tell its compression."""


def compression_of(head: bytes, name: str) -> Compression:
    """What a file is compressed with, empty for a plain one.

    Args:
        head: its first :data:`MAGIC_BYTES` bytes, or all that there are.
        name: the file, for the message.

    Raises:
        UserError: for an archive or a compression that is not read.
    """
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise UserError(f"{name} is {what}, which is not read", fix="unpack it, or compress it with gzip or zstd")
    return next((found for pattern, found in _MAGIC if pattern.match(head)), "")


def open_stream(raw: IO[bytes], compression: Compression) -> IO[bytes]:
    """The plain bytes of an open file."""
    if compression == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if compression == "bzip2":
        return cast(IO[bytes], bz2.BZ2File(raw))
    if compression == "xz":
        return cast(IO[bytes], lzma.LZMAFile(raw))
    if compression == "zstd":
        return io.BufferedReader(_ZstandardStream(raw), _CHUNK)
    if compression == "":
        return raw
    assert_never(compression)


def read_line(stream: IO[bytes], name: str, limit: int) -> bytes:
    """The next line with its end, at most ``limit`` bytes of it; empty at the end of the file.

    Raises:
        UserError: if the file cannot be read, or a compressed one is damaged or ends before its stream does.
    """
    try:
        return stream.readline(limit)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise unreadable(name, error) from error


def read_all(stream: IO[bytes], name: str, limit: int) -> bytes:
    """What is left of the file, at most ``limit`` bytes; raises as :func:`read_line` does."""
    try:
        return stream.read(limit)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception) -> UserError:
    """What is said of an input that is damaged, or that the system cannot read."""
    number = getattr(error, "errno", None)
    why = " ".join(str(error).split())  # some libraries write several lines
    what = f"cannot be read: {getattr(error, 'strerror', why)}" if number else f"is damaged or cut short: {why}"
    return UserError(
        f"{name} {what}", fix="copy it again from its source, then run the same command: what is done is kept"
    )


class _ZstandardStream(io.RawIOBase):
    """All frames of a Zstandard file. The library's own stream reader ends quietly in the middle of a frame."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw = raw
        self._library = zstandard
        # Corpora are packed with --long=31: the largest window there is.
        self._open_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame = self._open_frame()
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
            self._frame = self._open_frame()
        self._fresh = False
        try:
            self._ready = memoryview(self._frame.decompress(compressed))
        except self._library.ZstdError as error:
            raise EOFError(str(error)) from error
        return True

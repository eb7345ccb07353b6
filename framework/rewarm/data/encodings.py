"""One strict encoding per file, decided once from its beginning.

A byte-order mark decides; without one it is what the user names, by default UTF-8. Whatever the encoding, readers see
UTF-8: a byte that the encoding does not know reaches them as it is, so that its line is refused there.
"""

from __future__ import annotations

import codecs
import io
from typing import IO, Any, cast

from rewarm.errors import UserError

UTF_8 = "utf-8"
HEAD_BYTES = 1 << 16
"""Bytes of a file's beginning from which its encoding is decided."""
MARK = "\ufeff"
"""The byte-order mark as a character. At the start of a line, a record or a document it is no text."""
_MARKS = (
    # The mark of UTF-16 is the beginning of that of UTF-32.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, UTF_8),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CHUNK = 1 << 18
_FEW, _MANY = 0.05, 0.3


def check_encoding(encoding: str) -> str:
    """The library's name of an encoding that the user gave.

    Raises:
        UserError: if there is none of that name, or it does not encode text.
    """
    try:
        info = codecs.lookup(encoding)
        "a".encode(encoding)
    except (LookupError, UnicodeError, ValueError) as error:
        raise UserError(
            f"--encoding {encoding}: there is no such text encoding",
            fix="name one that Python knows, for example utf-16-le, cp1252, latin-1, gb18030 or shift_jis",
        ) from error
    return UTF_8 if info.name == "utf-8-sig" else info.name


def decide_encoding(head: bytes, given: str | None, name: str) -> str:
    """The encoding of a file of text.

    Args:
        head: its first :data:`HEAD_BYTES` plain bytes, or all that there are.
        given: from :func:`check_encoding`; None if the user named none.
        name: the file, for the message.

    Raises:
        UserError: if it is UTF-16 or UTF-32 without a mark, and the user named no encoding.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if given is not None:
        return given
    wide = _wide(head)
    if wide:
        raise UserError(
            f"{name} is not UTF-8: the NUL bytes in it are those of {wide} without a byte-order mark",
            fix=f"name the encoding: --encoding {wide}",
        )
    return UTF_8


def _wide(head: bytes) -> str | None:
    """UTF-16 or UTF-32 that has no mark, by where its NUL bytes stand; None for anything else."""
    quarters = len(head) // 4
    if quarters:
        first, second, third, fourth = (head[place : quarters * 4 : 4].count(0) / quarters for place in range(4))
        if first < _FEW and min(third, fourth) > 1 - _FEW:
            return "utf-32-le"
        if fourth < _FEW and min(first, second) > 1 - _FEW:
            return "utf-32-be"
    pairs = len(head) // 2
    if pairs:
        even, odd = head[0 : pairs * 2 : 2].count(0) / pairs, head[1 : pairs * 2 : 2].count(0) / pairs
        if even < _FEW and odd > _MANY:
            return "utf-16-le"
        if odd < _FEW and even > _MANY:
            return "utf-16-be"
    return None


def as_utf8(stream: IO[bytes], encoding: str, name: str) -> IO[bytes]:
    """The bytes of a text in UTF-8; bytes that the encoding does not know stay, and are no UTF-8."""
    return stream if encoding == UTF_8 else cast(IO[bytes], io.BufferedReader(_Recoded(stream, encoding, name), _CHUNK))


class _Recoded(io.RawIOBase):
    def __init__(self, stream: IO[bytes], encoding: str, name: str) -> None:
        self._stream, self._encoding, self._name = stream, encoding, name
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
        self._ready = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        """True: this is an input."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer with UTF-8; 0 at the end."""
        target = memoryview(buffer).cast("B")
        while not self._ready and not self._ended:
            raw = self._stream.read(_CHUNK)
            self._ended = not raw
            try:
                text = self._decoder.decode(raw, final=self._ended)
                self._ready = memoryview(text.encode(UTF_8, "surrogateescape"))
            except UnicodeError as error:
                reason = getattr(error, "reason", error)
                raise UserError(
                    f"{self._name} is not {self._encoding}: {reason}", fix="name its encoding: --encoding NAME"
                ) from error
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

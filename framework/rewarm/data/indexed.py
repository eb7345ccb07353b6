"""Megatron-Core's indexed token files (``.bin`` and ``.idx``), read and written with numpy alone.

The format is that of ``megatron.core.datasets.indexed_dataset`` (0.16). The ``.bin`` is the bare tokens. The ``.idx``
holds, little endian and unaligned: magic (9 bytes), version (uint64), dtype code (uint8), number of sequences
(uint64), number of document entries (uint64), then the int32 length and the int64 byte offset of every sequence, the
int64 index of the first sequence of every document (with one entry more for the end), and, for multimodal data only,
an int8 mode per sequence.

Opening reads a few dozen bytes whatever the size: the tables are never loaded.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewarm.errors import UserError, ensure

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
MAX_SEQUENCE_TOKENS = 2**31 - 1
"""Longest document that one entry of the index can describe."""
MAX_MAPS = 256
"""Token files that a process keeps mapped, those last read: a thousand domains would take up all the files that it may
have open, which is 1024 by default. Mapping one again takes a few system calls."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type Megatron-Core picks for a vocabulary: uint16 below 65500 entries, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """The fixed part of an ``.idx`` file and the places of the tables that follow it."""

    dtype: np.dtype[Any]
    num_sequences: int
    num_document_entries: int

    @property
    def pointers_offset(self) -> int:
        """Byte offset of the table of sequence offsets."""
        return _HEADER.size + 4 * self.num_sequences

    @property
    def documents_offset(self) -> int:
        """Byte offset of the table of documents."""
        return self.pointers_offset + 8 * self.num_sequences

    @property
    def size(self) -> int:
        """Bytes of a whole ``.idx`` file without modes."""
        return self.documents_offset + 8 * self.num_document_entries


def read_header(path: Path) -> IndexHeader:
    """Read and check the fixed part of an ``.idx`` file.

    Raises:
        UserError: if the file is no index, is of another version, holds no integer tokens, or is cut short.
    """
    with open(path, "rb") as stream:
        raw = stream.read(_HEADER.size)
    if len(raw) < _HEADER.size or raw[:9] != MAGIC:
        raise UserError(f"{path} is not a Megatron index file", fix=_REBUILD)
    _, version, code, sequences, documents = _HEADER.unpack(raw)
    if version != 1:
        raise UserError(f"{path} has index version {version}; only version 1 is known", fix=_REBUILD)
    if code not in _DTYPES:
        raise UserError(f"{path} has dtype code {code}, which is no integer token type", fix=_REBUILD)
    header = IndexHeader(np.dtype(_DTYPES[code]), sequences, documents)
    found = path.stat().st_size
    if found not in (header.size, header.size + sequences):
        raise UserError(f"{path} should have {header.size} bytes and has {found}: it is cut short", fix=_REBUILD)
    return header


CHECKED_BYTES = 1 << 24
"""Files up to this size are read whole when a domain is opened, which takes milliseconds; of larger ones the ends and
a spread of blocks are looked at."""
_REBUILD = "copy the pair again from its source, or make it again with: rewarm data build"


class IndexedTokens:
    """An opened pair: the tokens of all documents in one stream, and where each document starts.

    Args:
        prefix: path of the pair without ``.bin`` and ``.idx``.

    Attributes:
        num_tokens: tokens in the ``.bin``.
        num_documents: documents in the ``.idx``.
        dtype: type of a token on disk.

    Raises:
        UserError: if a file is missing, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = Path(self.prefix + ".bin"), Path(self.prefix + ".idx")
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise UserError(f"{path} does not exist", fix="a domain needs both a .bin and an .idx file")
        self.header = read_header(self.idx_path)
        self.dtype = self.header.dtype
        status = self.bin_path.stat()
        self.num_bytes, self._modified = status.st_size, status.st_mtime_ns
        self._check_pair()
        self.num_tokens = self.num_bytes // self.dtype.itemsize
        self.num_documents = max(0, self.header.num_document_entries - 1)

    def _check_pair(self) -> None:
        header, expected, closing = self.header, 0, 0
        with open(self.idx_path, "rb") as stream:
            if header.num_sequences:
                last = header.num_sequences - 1
                (length,) = _read(stream.fileno(), "<i", _HEADER.size + 4 * last)
                (pointer,) = _read(stream.fileno(), "<q", header.pointers_offset + 8 * last)
                expected = pointer + length * header.dtype.itemsize
            if header.num_document_entries:
                (closing,) = _read(stream.fileno(), "<q", header.size - 8)
        if closing != header.num_sequences:
            raise UserError(
                f"{self.idx_path} closes its documents at sequence {closing} of {header.num_sequences}", fix=_REBUILD
            )
        if self.num_bytes != expected:
            why = "it is cut short" if self.num_bytes < expected else "the two do not belong together"
            raise UserError(
                f"{self.bin_path} should have {expected} bytes by its .idx and has {self.num_bytes}: {why}",
                fix=_REBUILD,
            )
        if header.size <= CHECKED_BYTES:
            self._check_tables()

    def _check_tables(self) -> None:
        """Refuse an index that contradicts itself: offsets follow from lengths, and documents never go back."""
        header = self.header
        raw = self.idx_path.read_bytes()
        lengths = np.frombuffer(raw, "<i4", header.num_sequences, _HEADER.size).astype(np.int64)
        pointers = np.frombuffer(raw, "<i8", header.num_sequences, header.pointers_offset)
        documents = np.frombuffer(raw, "<i8", header.num_document_entries, header.documents_offset)
        starts = (np.cumsum(lengths) - lengths) * header.dtype.itemsize
        sound = (lengths >= 0).all() and (pointers == starts).all() and (np.diff(documents) >= 0).all()
        if not sound or (len(documents) and documents[0] != 0):
            raise UserError(
                f"{self.idx_path} is damaged: its lengths, offsets and documents do not fit together", fix=_REBUILD
            )

    @property
    def tokens(self) -> np.ndarray:
        """[num_tokens] of the type on disk, memory mapped and read only. Do not keep it: each map holds a file open."""
        if self.num_tokens == 0:
            return np.empty(0, self.dtype)
        return _map(str(self.bin_path), self.dtype.str, self.num_bytes, self._modified)

    def document_start(self, document: int) -> int:
        """Token at which a document starts; ``num_documents`` gives the end of the stream."""
        with open(self.idx_path, "rb") as stream:
            return self._start(stream.fileno(), document)

    def _start(self, descriptor: int, document: int) -> int:
        assert 0 <= document <= self.num_documents, f"document {document} of {self.num_documents}"
        if document == self.num_documents:
            return self.num_tokens
        (sequence,) = _read(descriptor, "<q", self.header.documents_offset + 8 * document)
        if sequence == self.header.num_sequences:
            return self.num_tokens
        (pointer,) = _read(descriptor, "<q", self.header.pointers_offset + 8 * sequence)
        return int(pointer) // self.dtype.itemsize

    def last_document_at_or_before(self, token: int) -> int:
        """The last document that starts at or before a token, by binary search in the file."""
        low, high = 0, self.num_documents
        with open(self.idx_path, "rb") as stream:
            while high - low > 1:
                middle = (low + high) // 2
                if self._start(stream.fileno(), middle) <= token:
                    low = middle
                else:
                    high = middle
        return low

    def document(self, document: int) -> np.ndarray:
        """Tokens of one document, of the type on disk."""
        return self.tokens[self.document_start(document) : self.document_start(document + 1)]


@functools.lru_cache(maxsize=MAX_MAPS)
def _map(path: str, dtype: str, num_bytes: int, modified: int) -> np.ndarray:
    """The tokens of a file that has not changed since it was opened.

    Raises:
        UserError: if it has.
    """
    try:
        with open(path, "rb") as stream:
            status = os.fstat(stream.fileno())
            if (status.st_size, status.st_mtime_ns) == (num_bytes, modified):
                return np.memmap(stream, dtype=dtype, mode="r")
    except FileNotFoundError:
        pass
    raise UserError(
        f"{path} was changed or removed while it is in use",
        fix="leave the token files of a run as they are: build other content to another folder",
    )


def _read(descriptor: int, layout: str, offset: int) -> tuple[Any, ...]:
    return struct.unpack(layout, os.pread(descriptor, struct.calcsize(layout), offset))


class IndexedWriter:
    """Writes a pair document by document, one sequence each, under its final names only once both are whole.

    Args:
        prefix: path of the pair without suffix; the folder must exist.
        dtype: type of a token on disk.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any]) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        self._lengths: list[np.ndarray] = []
        self._bin = open(self.prefix + ".bin.partial", "wb")  # noqa: SIM115 - closed by close()

    def add(self, tokens: np.ndarray, lengths: Iterable[int] | np.ndarray) -> None:
        """Append whole documents.

        Args:
            tokens: [sum of lengths] in the writer's type, documents one after another.
            lengths: tokens of each document.
        """
        table = np.fromiter(lengths, np.int32) if not isinstance(lengths, np.ndarray) else lengths.astype(np.int32)
        ensure(
            tokens.dtype == self.dtype and int(table.sum(dtype=np.int64)) == len(tokens),
            "tokens of another type or number than the documents say",
        )
        self._bin.write(np.ascontiguousarray(tokens).data)
        self._lengths.append(table)

    def close(self) -> None:
        """Write the index, flush both files to disk and give them their names."""
        _finish(self._bin)
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        with open(self.prefix + ".idx.partial", "wb") as index:
            index.write(_HEADER.pack(MAGIC, 1, _CODES[self.dtype], len(lengths), len(lengths) + 1))
            index.write(lengths.data)
            ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            index.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).data)
            index.write(np.arange(len(lengths) + 1, dtype=np.int64).data)
            _finish(index)
        for suffix in (".bin", ".idx"):
            os.replace(self.prefix + suffix + ".partial", self.prefix + suffix)

    def abort(self) -> None:
        """Close and remove what was begun."""
        self._bin.close()
        for suffix in (".bin.partial", ".idx.partial"):
            Path(self.prefix + suffix).unlink(missing_ok=True)


def _finish(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()

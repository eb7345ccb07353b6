"""Parts: the tokenized pieces of a batch of shards, each on disk whole or not at all.

A batch is one shard of a large file, or many small files: to flush a part for each of those would take longer than all
the rest. A batch gives one part for every 64 MiB of text. A part's name is made of everything its content depends on,
so that a build that was killed, or got more inputs, finds what is done, and never takes what was made otherwise.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rewarm.data.indexed import MAX_SEQUENCE_TOKENS, token_dtype
from rewarm.data.readers import InputShard, Item, ShardReader, TextDocument
from rewarm.data.records import TextRule
from rewarm.data.split import HASH_BYTES, text_hash
from rewarm.data.tokenizer import TextTokenizer, open_tokenizer

PART_BYTES = 64 * 2**20
"""What a build takes for ``EncodeSettings.part_bytes``."""
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1000
_PART_FORMAT = "rewarm-part-2"
_MAX_BATCH_FILES = 4096

Batch = tuple[InputShard, ...]
"""Shards that one worker reads one after another into the same parts."""


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """What decides the content of a part besides its shards."""

    tokenizer: str
    tokenizer_fingerprint: str
    end_of_document: str
    special_tokens: str
    text_key: str
    text_document: TextDocument
    part_bytes: int
    """UTF-8 bytes of text after which a part is closed."""
    text_template: str | None = None
    beginning_of_document: int | None = None
    """Token in front of each document."""


class Reject(NamedTuple):
    """A malformed record."""

    shard: int
    """Its place in the batch."""
    line: int
    """Within the shard, from 1."""
    why: str
    raw: str


@dataclass
class PartInfo:
    """What a part holds besides documents."""

    records: int = 0
    """Records read for it, malformed and empty ones included."""
    lines: int = 0
    """Lines of the shard in hand up to the end of the part."""
    empty: int = 0
    """Texts without a character that is not a space."""
    max_token_id: int = -1
    final: bool = False
    """True for the last part of its batch."""
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Part:
    """The N documents of a part."""

    tokens: np.ndarray
    """uint16 or int32 [sum of lengths]."""
    lengths: np.ndarray
    """int32 [N]; tokens of each document."""
    sizes: np.ndarray
    """int64 [N]; UTF-8 bytes of each text."""


def make_batches(shards: list[InputShard], small: int, large: int) -> list[Batch]:
    """Put neighbouring small files together; anything else stands alone.

    Args:
        shards: of the whole input, in order.
        small: bytes up to which a file is small.
        large: most bytes of a batch of several.
    """
    batches: list[list[InputShard]] = []
    weight, is_open = 0, False
    for shard in shards:
        fits = shard.weight == shard.size <= small
        if fits and is_open and weight + shard.weight <= large and len(batches[-1]) < _MAX_BATCH_FILES:
            batches[-1].append(shard)
            weight += shard.weight
        else:
            batches.append([shard])
            weight, is_open = shard.weight, fits
    return [tuple(batch) for batch in batches]


def batch_key(batch: Batch, settings: EncodeSettings) -> str:
    """The name that all parts of a batch begin with."""
    shards = [asdict(shard) for shard in batch]
    for shard in shards:
        shard.pop("name")  # how the user wrote it: the path speaks for it
    identity = {"format": _PART_FORMAT, "shards": shards, **asdict(settings)}
    identity.pop("tokenizer")  # a place, not a content: the fingerprint speaks for it
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()


def part_path(folder: Path, key: str, number: int) -> Path:
    """Where a part lies."""
    return folder / f"{key}-{number:05d}.npz"


def read_info(path: Path) -> PartInfo:
    """A part's counts, without its tokens."""
    with np.load(path) as archive:
        return _parse_info(archive["info"])


def _parse_info(raw: np.ndarray) -> PartInfo:
    fields = json.loads(raw.tobytes())
    return PartInfo(**{**fields, "rejects": [Reject(*reject) for reject in fields["rejects"]]})


def read_table(path: Path) -> tuple[PartInfo, np.ndarray, np.ndarray]:
    """A part's counts, the uint64 [N, 2] hashes and the int32 [N] lengths of its documents, without its tokens."""
    with np.load(path) as archive:
        return _parse_info(archive["info"]), _as_hashes(archive["hashes"]), archive["lengths"]


def _as_hashes(raw: np.ndarray) -> np.ndarray:
    return raw.view(">u8").astype(np.uint64).reshape(-1, 2)


def read_part(path: Path) -> Part:
    """A part's documents."""
    with np.load(path) as archive:
        return Part(archive["tokens"], archive["lengths"], archive["sizes"])


def finished_parts(folder: Path, key: str) -> tuple[list[PartInfo], bool]:
    """The parts of a batch that are on disk, in order, and whether they are all."""
    infos: list[PartInfo] = []
    while (path := part_path(folder, key, len(infos))).is_file():
        infos.append(read_info(path))
        if infos[-1].final:
            return infos, True
    return infos, False


class _PartBuilder:
    """Gathers the documents of one part and tokenizes them in batches."""

    def __init__(self, tokenizer: TextTokenizer, beginning: int | None) -> None:
        self.tokenizer, self.info = tokenizer, PartInfo()
        self._beginning = [] if beginning is None else [beginning]
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.text_bytes = 0
        self._texts: list[str] = []
        self._pending = 0
        self._tokens: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._hashes: list[bytes] = []
        self._sizes: list[int] = []

    def add(self, shard: int, item: Item) -> None:
        self.info.records += 1
        if item.text is None:
            self.info.rejects.append(Reject(shard, item.line, item.why, item.raw))
        elif not item.text.strip():
            self.info.empty += 1
        else:
            encoded = item.text.encode()
            self._texts.append(item.text)
            self._hashes.append(text_hash(encoded))
            self._sizes.append(len(encoded))
            self.text_bytes += len(encoded)
            self._pending += len(encoded)
            if self._pending >= _BATCH_BYTES or len(self._texts) >= _BATCH_DOCUMENTS:
                self.flush()

    def flush(self) -> None:
        for text in self.tokenizer.encode(self._texts) if self._texts else []:
            tokens = np.concatenate([self._beginning, text]).astype(np.int64) if self._beginning else text
            assert len(tokens) <= MAX_SEQUENCE_TOKENS
            self._lengths.append(len(tokens))
            self._tokens.append(tokens.astype(self.dtype))
            self.info.max_token_id = max(self.info.max_token_id, int(tokens.max()))
        self._texts, self._pending = [], 0

    def write(self, path: Path) -> None:
        self.flush()
        aside = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with open(aside, "wb") as stream:
                np.savez(
                    stream,
                    info=np.frombuffer(json.dumps(asdict(self.info)).encode(), np.uint8),
                    tokens=np.concatenate([np.empty(0, self.dtype), *self._tokens]),
                    lengths=np.array(self._lengths, np.int32),
                    hashes=np.frombuffer(b"".join(self._hashes), np.uint8).reshape(-1, HASH_BYTES),
                    sizes=np.array(self._sizes, np.int64),
                )
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


class _BatchReader:
    """The records of all shards of a batch, one after another."""

    def __init__(self, batch: Batch, settings: EncodeSettings) -> None:
        self._batch, self._settings = batch, settings
        self._rule = TextRule(settings.text_key, settings.text_template)
        self._before = 0
        self._reader: ShardReader | None = None

    @property
    def consumed(self) -> int:
        """Bytes of the batch's weight that were read."""
        return self._before + (self._reader.consumed if self._reader else 0)

    @property
    def lines(self) -> int:
        """Lines of the shard in hand."""
        return self._reader.lines if self._reader else 0

    def __iter__(self) -> Iterator[tuple[int, Item]]:
        for place, shard in enumerate(self._batch):
            self._reader = ShardReader(shard, self._rule, self._settings.text_document)
            yield from ((place, item) for item in self._reader)
            self._before += shard.weight
            self._reader.consumed = 0


def encode_batch(
    batch: Batch, settings: EncodeSettings, folder: Path, advance: Callable[[int], None] = lambda _: None
) -> list[PartInfo]:
    """Tokenize what is not yet on disk of a batch.

    Args:
        batch: what to read.
        settings: how to encode it.
        folder: where parts lie.
        advance: told the bytes of input that were read since it was last called.

    Returns:
        The counts of all parts of the batch, in order.
    """
    key = batch_key(batch, settings)
    infos, whole = finished_parts(folder, key)
    total = sum(shard.weight for shard in batch)
    if whole:
        advance(total)
        return infos
    tokenizer = _cached_tokenizer(settings)
    reader = _BatchReader(batch, settings)
    items = iter(reader)
    skipped = sum(info.records for info in infos)
    next(itertools.islice(items, skipped, skipped), None)
    told = 0
    while not (infos and infos[-1].final):
        builder = _PartBuilder(tokenizer, settings.beginning_of_document)
        builder.info.final = True
        for place, item in items:
            builder.add(place, item)
            if reader.consumed > told + _BATCH_BYTES:
                advance(reader.consumed - told)
                told = reader.consumed
            if builder.text_bytes >= settings.part_bytes:
                builder.info.final = False
                break
        builder.info.lines = reader.lines
        builder.write(part_path(folder, key, len(infos)))
        infos.append(builder.info)
    advance(total - told)
    return infos


_TOKENIZERS: dict[EncodeSettings, TextTokenizer] = {}


def _cached_tokenizer(settings: EncodeSettings) -> TextTokenizer:
    """One tokenizer a process: opening a large one takes longer than a small shard."""
    if settings not in _TOKENIZERS:
        _TOKENIZERS.clear()
        _TOKENIZERS[settings] = open_tokenizer(
            settings.tokenizer, end_of_document=settings.end_of_document, special_tokens=settings.special_tokens
        )
    return _TOKENIZERS[settings]

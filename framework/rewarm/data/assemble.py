"""The last step of a build: all parts, in input order, into the two pairs of a domain."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rewarm.data.domain import DIGEST, DOMAIN_FILE, file_digest, info_digest
from rewarm.data.indexed import IndexedWriter
from rewarm.data.parts import Batch, PartInfo, part_path, read_part, read_table
from rewarm.data.split import HeldOutBy, first_occurrences, held_out_mask
from rewarm.errors import ensure

REJECTS_FILE = "rejects.jsonl"
_SHOWN_REJECTS = 5
_SHOWN_LETTERS = 200


@dataclass
class SplitWriter:
    """One side of the split, as it is written and counted."""

    writer: IndexedWriter
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of the texts."""
    _digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def add(self, tokens: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> None:
        """Append documents."""
        self.writer.add(tokens, lengths)
        self._digest.update(np.ascontiguousarray(tokens).data)
        self.documents += len(lengths)
        self.tokens += len(tokens)
        self.bytes += int(sizes.sum())

    def describe(self) -> dict[str, Any]:
        """What ``domain.json`` says of this split; ``content_hash`` is BLAKE2b of the bytes of its ``.bin``."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "content_hash": self._digest.hexdigest(),
        }


class Assembly:
    """The state of the last step.

    Args:
        folder: where the result is put together, aside from what may stand in the domain folder.
        dtype: type of a token on disk.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self.folder, self.dtype = folder, dtype
        self.parts: list[Path] = []
        self.records = self.rejects = self.empty = self.duplicates = 0
        self.max_token_id = -1
        self.first_rejects: list[str] = []
        self.hashes = np.empty((0, 2), np.uint64)
        self.lengths = np.empty(0, np.int32)
        self.splits: dict[str, SplitWriter] = {}

    def scan(self, work: Path, batches: list[Batch], keys: list[str]) -> None:
        """List the parts, gather the hashes and lengths of all documents, and set the malformed records aside.

        Those go to ``rejects.jsonl``, one JSON object each; there is no such file if there are none.

        Args:
            work: where parts lie.
            batches: of the whole input, in order.
            keys: the names of their parts.
        """
        hashes, lengths = [self.hashes], [self.lengths]
        base, name = 0, ""
        # A name that is not UTF-8 is written as JSON's own escapes, which give it back.
        with open(self.folder / REJECTS_FILE, "w", encoding="utf-8", errors="backslashreplace") as rejects:
            for batch, key in zip(batches, keys, strict=True):
                # Pieces of one input count their lines from their own start; the input goes on.
                base = base if batch[0].name == name else 0
                name = batch[-1].name
                info = PartInfo()
                for number in itertools.count():
                    path = part_path(work, key, number)
                    info, table, sizes = read_table(path)
                    self.parts.append(path)
                    hashes.append(table)
                    lengths.append(sizes)
                    self._count(info, batch, base, rejects)
                    if info.final:
                        break
                base = base + info.lines if len(batch) == 1 else info.lines
        if not self.rejects:
            (self.folder / REJECTS_FILE).unlink()
        self.hashes, self.lengths = np.concatenate(hashes), np.concatenate(lengths)

    def _count(self, info: PartInfo, batch: Batch, base: int, rejects: Any) -> None:
        self.records += info.records
        self.empty += info.empty
        self.max_token_id = max(self.max_token_id, info.max_token_id)
        for reject in info.rejects:
            self.rejects += 1
            file = batch[reject.shard].name
            place = reject.line + (base if reject.shard == 0 else 0)
            entry = {"file": file, "line": place, "why": reject.why, "raw": reject.raw}
            rejects.write(json.dumps(entry, ensure_ascii=False) + "\n")
            if len(self.first_rejects) < _SHOWN_REJECTS:
                self.first_rejects.append(f"{file}:{place}: {reject.why}"[:_SHOWN_LETTERS])

    def abort(self) -> None:
        """Remove what was begun; the parts stay."""
        for split in self.splits.values():
            split.writer.abort()

    def close(self, info: dict[str, Any]) -> None:
        """Bring every file of the result to disk, ``domain.json`` included."""
        for split in self.splits.values():
            if split.documents:
                split.writer.close()
            else:
                split.writer.abort()
        for name, split in self.splits.items():
            if split.documents:
                info[name]["index_hash"] = file_digest(self.folder / f"{name}.idx")
        info[DIGEST] = info_digest(info)
        with open(self.folder / DOMAIN_FILE, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(json.dumps(info, indent=2, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def assemble(
    result: Assembly, held_out: float, by: HeldOutBy, deduplicate: bool, on_progress: Callable[[str, int, int], None]
) -> None:
    """Copy the documents that are kept from the parts to the pairs.

    Args:
        result: after :meth:`Assembly.scan`.
        held_out: share on the held-out side.
        by: what it is a share of.
        deduplicate: drop every document whose text came before.
        on_progress: told of every part.
    """
    keep = first_occurrences(result.hashes) if deduplicate else np.ones(len(result.hashes), bool)
    aside = held_out_mask(result.hashes, np.where(keep, result.lengths, 0), held_out, by)
    result.duplicates = int((~keep).sum())
    for name in ("train", "held_out"):
        result.splits[name] = SplitWriter(IndexedWriter(result.folder / name, result.dtype))
    first = 0
    try:
        for number, path in enumerate(result.parts):
            part = read_part(path)
            here = slice(first, first + len(part.lengths))
            first = here.stop
            for name, chosen in (("train", keep[here] & ~aside[here]), ("held_out", keep[here] & aside[here])):
                if chosen.any():
                    tokens = part.tokens[np.repeat(chosen, part.lengths)]
                    result.splits[name].add(tokens, part.lengths[chosen], part.sizes[chosen])
            on_progress("writing", number + 1, len(result.parts))
    except BaseException:
        result.abort()
        raise
    ensure(first == len(result.hashes), "a part is missing from the whole")

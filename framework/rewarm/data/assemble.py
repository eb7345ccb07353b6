"""The last step of a build: all parts, in input order, into the two pairs of a domain."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rewarm.data.domain import DIGEST, DOMAIN_FILE, file_digest, info_digest
from rewarm.data.indexed import IndexedWriter
from rewarm.data.parts import PartInfo, part_path, read_part, read_table
from rewarm.data.readers import Shard
from rewarm.data.split import first_occurrences, is_held_out
from rewarm.files import write_whole

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
        output: the domain folder.
        dtype: type of a token on disk.
    """

    def __init__(self, output: Path, dtype: np.dtype[Any]) -> None:
        self.output, self.dtype = output, dtype
        self.parts: list[Path] = []
        self.records = self.rejects = self.empty = self.duplicates = 0
        self.max_token_id = -1
        self.first_rejects: list[str] = []
        self.hashes = np.empty((0, 2), np.uint64)
        self.splits: dict[str, SplitWriter] = {}

    def scan(self, work: Path, shards: list[Shard], keys: list[str], rejects_file: Path) -> None:
        """List the parts, gather the hashes of all documents, and set the malformed records aside.

        Args:
            work: where parts lie.
            shards: of the whole input, in order.
            keys: the names of their parts.
            rejects_file: one JSON object a malformed record; there is no such file if there is none.
        """
        tables = []
        base, file = 0, ""
        aside = rejects_file.with_suffix(".partial")
        with open(aside, "w", encoding="utf-8") as rejects:
            for shard, key in zip(shards, keys, strict=True):
                # Shards count their lines from their own start; the file goes on.
                base = base if shard.path == file and shard.start > 0 else 0
                file = shard.path
                info = PartInfo()
                for number in range(2**31):
                    path = part_path(work, key, number)
                    info, hashes = read_table(path)
                    self.parts.append(path)
                    tables.append(hashes)
                    self._count(info, shard, base, rejects)
                    if info.final:
                        break
                base += info.lines
        if self.rejects:
            os.replace(aside, rejects_file)
        else:
            aside.unlink()
            rejects_file.unlink(missing_ok=True)
        self.hashes = np.concatenate([self.hashes, *tables])

    def _count(self, info: PartInfo, shard: Shard, base: int, rejects: Any) -> None:
        self.records += info.records
        self.empty += info.empty
        self.max_token_id = max(self.max_token_id, info.max_token_id)
        for reject in info.rejects:
            self.rejects += 1
            place = base + reject.line
            entry = {"file": shard.path, "line": place, "why": reject.why, "raw": reject.raw}
            rejects.write(json.dumps(entry, ensure_ascii=False) + "\n")
            if len(self.first_rejects) < _SHOWN_REJECTS:
                self.first_rejects.append(f"{shard.path}:{place}: {reject.why}"[:_SHOWN_LETTERS])

    def abort(self) -> None:
        """Remove what was begun; the parts stay."""
        for split in self.splits.values():
            split.writer.abort()

    def publish(self, output: Path, info: dict[str, Any]) -> None:
        """Give the pairs their names; ``domain.json`` goes first and comes last, so that it never names a mixture."""
        (output / DOMAIN_FILE).unlink(missing_ok=True)
        for name, split in self.splits.items():
            if split.documents:
                split.writer.close()
            else:
                split.writer.abort()
                for suffix in (".bin", ".idx"):
                    (output / f"{name}{suffix}").unlink(missing_ok=True)
        for name, split in self.splits.items():
            if split.documents:
                info[name]["index_hash"] = file_digest(output / f"{name}.idx")
        info[DIGEST] = info_digest(info)
        write_whole(output / DOMAIN_FILE, json.dumps(info, indent=2, ensure_ascii=False) + "\n")


def assemble(
    result: Assembly, work: Path, held_out: float, deduplicate: bool, on_progress: Callable[[str, int, int], None]
) -> None:
    """Copy the documents that are kept from the parts to the pairs.

    Args:
        result: after :meth:`Assembly.scan`.
        work: where parts lie.
        held_out: expected share of the documents on the held-out side.
        deduplicate: drop every document whose text came before.
        on_progress: told of every part.
    """
    keep = first_occurrences(result.hashes) if deduplicate else np.ones(len(result.hashes), bool)
    aside = is_held_out(result.hashes, held_out)
    result.duplicates = int((~keep).sum())
    for name in ("train", "held_out"):
        result.splits[name] = SplitWriter(IndexedWriter(result.output / name, result.dtype))
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
    assert first == len(result.hashes)

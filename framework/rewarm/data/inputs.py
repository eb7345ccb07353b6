"""From what the user names to the shards that workers read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rewarm.data.columnar import columnar_units
from rewarm.data.domain import DOMAIN_FILE
from rewarm.data.formats import COLUMNAR, KNOWN, Kind, may_hold_text, probe, suffix_kind
from rewarm.data.hub import dataset_files, is_saved_dataset
from rewarm.data.readers import InputShard, TextDocument
from rewarm.data.records import TextRule
from rewarm.errors import UserError

SHARD_BYTES = 32 * 2**20
"""Bytes of a shard: small enough for an even load and a live progress bar, large enough for few part files."""
STANDARD_INPUT = "-"


@dataclass(frozen=True, slots=True)
class InputOptions:
    """How inputs are read."""

    rule: TextRule = field(default_factory=TextRule)
    text_document: TextDocument = "file"
    """What a document of a text file is; files of lines can be read in several shards."""
    kind: Kind | None = None
    """What every file is, whatever its name."""
    encoding: str | None = None
    """Of files without a byte-order mark; None means UTF-8."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str | None = None
    """Split of a dataset; None means train."""
    streams: dict[str, Path] = field(default_factory=dict)
    """Where what came in through standard input or a pipe was put down."""


@dataclass(frozen=True, slots=True)
class InputPlan:
    """What will be read, in order."""

    shards: list[InputShard] = field(default_factory=list)
    num_files: int = 0
    """Files that hold at least one byte, each counted once."""
    num_ignored: int = 0
    """Files in the given folders that are of no kind that holds documents."""
    num_repeated: int = 0
    """Times that a file was reached again, by a link or because it was named twice."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the files, as they lie on disk."""
        return sum(shard.weight for shard in self.shards)


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    name: str
    kind: Kind | None
    named: bool
    """Whether the user named it, rather than a folder that holds it."""


def is_stream(given: str) -> bool:
    """Whether an input can be read only once: standard input, or a pipe such as ``<(command)``."""
    try:
        return given == STANDARD_INPUT or stat.S_ISFIFO(os.stat(given).st_mode)
    except OSError:
        return False


def plan_inputs(inputs: tuple[str, ...], options: InputOptions | None = None) -> InputPlan:
    """List the shards of all inputs, in the order given; the files of a folder go by name.

    Args:
        inputs: files, folders, datasets saved on disk, names on the Hugging Face hub, or ``-``.
        options: how to read them.

    Raises:
        UserError: for an input that is nothing of these, or holds no documents, and for options without effect.
    """
    options = options or InputOptions()
    shards: list[InputShard] = []
    ignored = files = repeated = 0
    seen: set[tuple[int, int]] = set()
    uses_library = False
    for given in inputs:
        found, others, from_library = _resolve(given, options)
        ignored, uses_library = ignored + others, uses_library or from_library
        for file in found:
            status = _status(file)
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                repeated += 1
                continue
            seen.add(identity)
            planned = list(_shards_of_file(file, status, options)) if status.st_size else []
            files += bool(planned)
            ignored += bool(status.st_size) and not planned
            shards.extend(planned)
    _check_effect(options, uses_library, shards)
    if not shards:
        raise UserError(
            f"there is nothing to read in {', '.join(inputs)}"
            + (f": {ignored} files of other kinds were left out" if ignored else ""),
            fix=f"files that are read are {KNOWN}, plain or compressed; --format text takes any file as text"
            if ignored
            else "give at least one input that is not empty",
        )
    return InputPlan(shards, files, ignored, repeated)


def _resolve(given: str, options: InputOptions) -> tuple[list[_Found], int, bool]:
    """The files of an input, how many files were left out, and whether the datasets library was asked for them."""
    path = Path(given)
    if given in options.streams:
        name = "standard input" if given == STANDARD_INPUT else given
        return [_Found(options.streams[given], name, options.kind, named=True)], 0, False
    if is_stream(given):
        raise UserError(f"{given} is a stream, which only rewarm data build reads", fix="write it to a file first")
    if path.is_dir() and not is_saved_dataset(path) and options.subset is None and options.split is None:
        found, ignored = _files_of_folder(path, options.kind)
        return found, ignored, False
    if path.is_file():
        kind = options.kind or suffix_kind(path)
        if kind is None and not may_hold_text(path):
            raise UserError(
                f"{given}: files of this kind are not read; known are {KNOWN}, plain or compressed",
                fix="take it as text with --format text (or jsonl, csv, …), or convert it first",
            )
        return [_Found(path, given, kind, named=True)], 0, False
    if path.exists() and not path.is_dir():
        raise UserError(f"{given} is neither a file nor a folder nor a pipe", fix="name a file")
    looks_like_a_file = not path.exists() and (path.is_absolute() or given.startswith(".") or suffix_kind(path))
    if looks_like_a_file or (given.count("/") > 1 and not path.exists()):
        raise UserError(f"{given} does not exist", fix="check the path; it is taken from the working directory")
    files = dataset_files(given, options.subset, options.split)
    return [_Found(file, given, "arrow", named=True) for file in files], 0, True


def _check_effect(options: InputOptions, uses_library: bool, shards: list[InputShard]) -> None:
    for option, value in (("--subset", options.subset), ("--split", options.split)):
        if value is not None and not uses_library:
            raise UserError(f"{option} {value} has no effect: no input is a dataset", fix=f"remove {option}")
    if shards and all(shard.kind == "text" for shard in shards):
        rule = options.rule
        option, value = ("--text-key", rule.key) if rule.template is None else ("--text-template", rule.template)
        if value != TextRule().key:
            raise UserError(
                f"{option} {value} has no effect: the input is plain text, which has no fields",
                fix=f"remove {option}, or say what the files are: --format jsonl",
            )


def _files_of_folder(folder: Path, kind: Kind | None) -> tuple[list[_Found], int]:
    """The files below a folder that may hold documents, by name; each folder once, by whatever links it is reached."""
    found: list[_Found] = []
    ignored = 0
    visited: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if DOMAIN_FILE in names:
            # The output of a build may lie in its input, and its list of rejects would be taken for text.
            ignored += len(names)
            continue
        for name in sorted(names):
            path = Path(root) / name
            wanted = not name.startswith(".") and (kind is not None or may_hold_text(path))
            if wanted and (path.is_file() or not path.exists()):
                found.append(_Found(path, str(path), kind or suffix_kind(path), named=False))
            else:
                ignored += 1
    return found, ignored


def _status(file: _Found) -> os.stat_result:
    try:
        status = file.path.stat()
        with open(file.path, "rb"):
            pass
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be read: {error.strerror}", fix="check the path and its permissions"
        ) from error
    return status


def _shards_of_file(file: _Found, status: os.stat_result, options: InputOptions) -> Iterator[InputShard]:
    how = probe(file.path, file.name, file.kind, options.encoding)
    if how is None:
        if file.named:
            raise UserError(f"{file.name} is not text: it holds NUL bytes", fix="convert it to text first")
        return
    size, path = status.st_size, str(file.path.resolve())
    units = size
    if how.kind in COLUMNAR:
        units = columnar_units(how.kind, file.path, file.name, options.rule.fields)
    whole = how.kind in ("json", "csv", "tsv") or (how.kind == "text" and options.text_document != "line")
    shard = InputShard(
        how.kind, path, size, status.st_mtime_ns, 0, units, size, how.compression, how.encoding, file.name
    )
    pieces = 1 if whole or shard.is_sequential else min(units, -(-size // SHARD_BYTES))
    for piece in range(pieces):
        start, stop = units * piece // pieces, units * (piece + 1) // pieces
        weight = size * stop // units - size * start // units
        yield InputShard(
            how.kind, path, size, status.st_mtime_ns, start, stop, weight, how.compression, how.encoding, file.name
        )

"""From what the user names to the shards that workers read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewarm.data.compressed import is_compressed
from rewarm.data.readers import Kind, Shard, suffix_kind
from rewarm.errors import UserError

SHARD_BYTES = 32 * 2**20
"""Bytes of a shard: small enough for an even load and a live progress bar, large enough for few part files."""
_LIBRARY_SUFFIXES = {".json": "json", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}


@dataclass(frozen=True, slots=True)
class InputPlan:
    """What will be read, in order."""

    shards: list[Shard] = field(default_factory=list)
    num_files: int = 0
    num_ignored: int = 0
    """Files in the given folders that are of no kind that holds documents."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the files, as they lie on disk."""
        return sum(shard.weight for shard in self.shards)


def plan_inputs(
    inputs: tuple[str, ...],
    *,
    text_key: str = "text",
    text_document: str = "file",
    subset: str | None = None,
    split: str = "train",
) -> InputPlan:
    """List the shards of all inputs, in the order given; the files of a folder go by name.

    Args:
        inputs: files, folders, datasets saved on disk, or names on the Hugging Face hub.
        text_key: column of columnar files.
        text_document: what a document of a text file is; files of lines can be read in several shards.
        subset: configuration of a hub dataset.
        split: split of a dataset.

    Raises:
        UserError: for an input that is nothing of these, or holds no documents.
    """
    shards: list[Shard] = []
    files = ignored = 0
    for given in inputs:
        path = Path(given)
        found: list[tuple[Kind, Path]]
        if path.is_file() and (kind := suffix_kind(path)) is not None:
            found = [(kind, path)]
        elif path.is_dir() and not _is_saved_dataset(path):
            found, others = _files_of_folder(path)
            ignored += others
            found = found or [("arrow", file) for file in _dataset_files(given, subset, split)]
        else:
            found = [("arrow", file) for file in _dataset_files(given, subset, split)]
        files += len(found)
        for kind, file in found:
            shards.extend(_shards_of_file(kind, file, text_key, text_document))
    if not shards:
        raise UserError(
            f"there is nothing to read in {', '.join(inputs)}", fix="give at least one input that is not empty"
        )
    return InputPlan(shards, files, ignored)


def _files_of_folder(folder: Path) -> tuple[list[tuple[Kind, Path]], int]:
    found: list[tuple[Kind, Path]] = []
    ignored = 0
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            kind = suffix_kind(Path(name))
            if kind is None or name.startswith("."):
                ignored += 1
            else:
                found.append((kind, Path(root) / name))
    return found, ignored


def _shards_of_file(kind: Kind, path: Path, text_key: str, text_document: str) -> Iterator[Shard]:
    try:
        status = path.stat()
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", fix="check the path and its permissions") from error
    size, name = status.st_size, str(path.resolve())
    if size == 0:
        return
    units = size
    if kind in ("parquet", "arrow"):
        units = _columnar_units(kind, path, text_key)
    whole = is_compressed(name) or (kind == "text" and text_document != "line")
    pieces = 1 if whole else min(units, -(-size // SHARD_BYTES))
    for piece in range(pieces):
        start, stop = units * piece // pieces, units * (piece + 1) // pieces
        weight = size * stop // units - size * start // units
        yield Shard(kind, name, size, status.st_mtime_ns, start, stop, weight)


def _columnar_units(kind: Kind, path: Path, text_key: str) -> int:
    """Row groups of a parquet file or record batches of an Arrow stream, after a look at its columns."""
    import pyarrow
    import pyarrow.parquet

    try:
        if kind == "parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                columns, units = file.schema_arrow.names, file.num_row_groups
        else:
            with pyarrow.memory_map(str(path)) as source:
                stream = pyarrow.ipc.open_stream(source)
                columns, units = stream.schema.names, sum(1 for _ in stream)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read: {error}", fix="copy it again from its source") from error
    if text_key not in columns:
        raise UserError(
            f"{path} has no column {text_key!r}; it has {columns}", fix="name the column: --text-key COLUMN"
        )
    return int(units)


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _dataset_files(given: str, subset: str | None, split: str) -> list[Path]:
    """The Arrow files of anything that the datasets library can open, converted once into its cache if need be."""
    path = Path(given)
    looks_like_a_file = not path.exists() and (path.is_absolute() or given.startswith(".") or suffix_kind(path))
    if looks_like_a_file or (given.count("/") > 1 and not path.exists()):
        raise UserError(f"{given} does not exist", fix="check the path; it is taken from the working directory")
    import datasets

    datasets.disable_progress_bars()
    try:
        if path.is_dir() and _is_saved_dataset(path):
            loaded = datasets.load_from_disk(given)
        elif path.is_file():
            builder = _LIBRARY_SUFFIXES.get(path.suffix.lower())
            if builder is None:
                known = [".txt", ".jsonl", ".parquet", *_LIBRARY_SUFFIXES]
                raise UserError(f"{given}: files of this kind are not read; known are {known}", fix="convert it first")
            loaded = datasets.load_dataset(builder, data_files=given)
        else:
            loaded = datasets.load_dataset(given, subset)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds for an unknown name, no network, a bad file
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{given} is no file or folder here, and datasets cannot load it: {reason[0] if reason else error!r}",
            fix="check the name; a hub name needs a network, and some need --subset",
        ) from error
    return _arrow_files(given, _pick_split(given, loaded, split))


def _pick_split(given: str, loaded: Any, split: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise UserError(f"{given} has no split {split!r}; it has {sorted(loaded)}", fix="name one: --split NAME")
    return loaded[split]


def _arrow_files(given: str, dataset: Any) -> list[Path]:
    if dataset._indices is not None:
        raise UserError(
            f"{given} was saved with a selection of rows that lies beside its files",
            fix="save it flat: dataset.flatten_indices().save_to_disk(folder)",
        )
    return [Path(file["filename"]) for file in dataset.cache_files]

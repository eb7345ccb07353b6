"""Rows of Parquet files and of Arrow streams and files."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewarm.data.compressed import unreadable
from rewarm.errors import UserError

_BATCH_ROWS = 1024
Row = dict[str, Any] | UnicodeDecodeError
"""Columns by name; or why the row is not UTF-8, which the format promises and nobody checks."""


def columnar_units(kind: str, path: Path, name: str, fields: tuple[str, ...]) -> int:
    """Row groups of a Parquet file or record batches of an Arrow file, after a look at its columns.

    Args:
        kind: ``parquet`` or ``arrow``.
        path: the file.
        name: as the user knows it.
        fields: that will be read, possibly inside columns.

    Raises:
        UserError: if it cannot be read, or has no such column.
    """
    with _explained(name), _opened(kind, path) as file:
        columns = list(file.schema_arrow.names if kind == "parquet" else file.schema.names)
        units = file.num_row_groups if kind == "parquet" else _count_batches(file)
    for field in fields:
        if _column(field, columns) is None:
            raise UserError(
                f"{name} has no column {field!r}; it has {columns}", fix="name the column: --text-key COLUMN"
            )
    return units


def columnar_rows(
    kind: str, path: str, name: str, fields: tuple[str, ...], start: int, stop: int
) -> Iterator[tuple[int, list[Row]]]:
    """The rows of some row groups or record batches.

    Args:
        kind: ``parquet`` or ``arrow``.
        path: the file.
        name: as the user knows it.
        fields: to read.
        start: first row group or record batch.
        stop: end of them.

    Yields:
        (row groups or record batches that are done with these rows, the rows with their columns).
    """
    with _explained(name), _opened(kind, Path(path)) as file:
        names = list(file.schema_arrow.names if kind == "parquet" else file.schema.names)
        columns = sorted({column for field in fields if (column := _column(field, names)) is not None})
        for unit in range(start, stop):
            if kind == "parquet":
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[unit], columns=columns):
                    yield unit - start, _rows(batch)
            else:
                yield unit - start, _rows(_batch(file, unit, start).select(columns))
            yield unit + 1 - start, []


def rows_before(kind: str, path: str, name: str, start: int) -> int:
    """Rows in front of a row group or record batch."""
    with _explained(name), _opened(kind, Path(path)) as file:
        if kind == "parquet":
            return sum(file.metadata.row_group(unit).num_rows for unit in range(start))
        return sum(_batch(file, unit, 0).num_rows for unit in range(start))


def _rows(batch: Any) -> list[Row]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        return (
            [error]
            if batch.num_rows == 1
            else [row for one in range(batch.num_rows) for row in _rows(batch.slice(one, 1))]
        )


def _column(field: str, names: list[str]) -> str | None:
    if field in names:
        return field
    outer = field.partition(".")[0]
    return outer if outer in names and outer != field else None


@contextlib.contextmanager
def _opened(kind: str, path: Path) -> Iterator[Any]:
    """The open file. Python opens it, since pyarrow takes only names that are UTF-8."""
    import pyarrow
    import pyarrow.parquet

    with open(path, "rb") as raw:
        if kind == "parquet":
            with pyarrow.parquet.ParquetFile(raw) as file:
                yield file
        else:
            source = pyarrow.BufferReader(pyarrow.py_buffer(mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)))
            of_files = raw.read(6) == b"ARROW1"
            yield pyarrow.ipc.open_file(source) if of_files else pyarrow.ipc.open_stream(source)


def _count_batches(file: Any) -> int:
    return file.num_record_batches if hasattr(file, "num_record_batches") else sum(1 for _ in file)


def _batch(file: Any, unit: int, start: int) -> Any:
    """A record batch; those of a stream are asked for in order, from the first that is wanted."""
    if hasattr(file, "get_batch"):
        return file.get_batch(unit)
    if unit == start:
        for _ in range(start):
            file.read_next_batch()
    return file.read_next_batch()


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(name, error) from error

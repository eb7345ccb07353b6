"""Reading slices of a sharded safetensors folder, and writing one without ever holding a shard in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from rewarm.errors import UserError, ensure

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000

_FLOATS = ("F32", "BF16", "F16")


class TensorFolder:
    """The tensors of a Hugging Face folder, read slice by slice. A context manager.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the files it names.

    Raises:
        UserError: if a file is missing or damaged, or the index does not fit the files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        index = self._index()
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            for name in self._open(file).keys():  # noqa: SIM118 (not a dict)
                if name in self._file_of:
                    raise UserError(f"{self.folder}: {name} is both in {self._file_of[name]} and in {file}")
                self._file_of[name] = file
        for name, file in (index or {}).items():
            if self._file_of.get(name) != file:
                raise UserError(
                    f"{self.folder / INDEX} places {name} in {file}, which does not hold it",
                    fix="download the folder again",
                )

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._handles.clear()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name.

        Raises:
            UserError: if a tensor is not a floating-point type that training can start from.
        """
        shapes = {}
        for name in self._file_of:
            piece = self._slice(name)
            if piece.get_dtype() not in _FLOATS:
                raise UserError(
                    f"{self.folder}: the tensor {name} has type {piece.get_dtype()}, which cannot be trained",
                    fix="start from the float32, bfloat16 or float16 weights, not from a quantised copy",
                )
            shapes[name] = tuple(piece.get_shape())
        return shapes

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        """A block of one tensor, in the type it is stored in.

        Args:
            name: of a tensor with one dimension, or two where ``columns`` is given.
            rows: range of the first dimension.
            columns: range of the second.
        """
        piece = self._slice(name)
        return piece[rows] if columns is None else piece[rows, columns]

    def drop(self, name: str) -> None:
        """Leave a tensor out of :meth:`shapes`."""
        del self._file_of[name]

    def _slice(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(name)

    def _index(self) -> dict[str, str] | None:
        path = self.folder / INDEX
        if not path.exists():
            if not (self.folder / SINGLE).exists():
                raise UserError(
                    f"{self.folder} holds neither {SINGLE} nor {INDEX}",
                    fix="only safetensors are read; convert older .bin files by loading and saving them once with "
                    "transformers",
                )
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}", fix="download the folder again") from error

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(str(self.folder / file), framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / file} cannot be read: {error}", fix="the file is missing or damaged: download it again"
            ) from error
        return self._handles.setdefault(file, handle)


class TensorWriter:
    """Writes tensors one by one, in any order, into sharded safetensors files laid out in advance.

    The format (8-byte header length, JSON header, raw little-endian data) lets every tensor go straight to its
    place, so that memory never holds more than the tensor being written.

    Args:
        folder: exists.
        shapes: every tensor that will be written, in file order.
        dtype: ``torch.float32`` or ``torch.bfloat16``; tensors are converted to it.
        max_shard_bytes: largest file, unless one tensor alone is larger.
    """

    def __init__(
        self,
        folder: str | Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        import torch

        self.folder, self._shapes, self._dtype = Path(folder), dict(shapes), dtype
        self._code = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        self._place: dict[str, tuple[str, int]] = {}
        self._written: set[str] = set()
        sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        shards: list[list[str]] = [[]]
        filled = 0
        for name, size in sizes.items():
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        for number, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._write_header(file, {name: sizes[name] for name in names})
        if len(shards) > 1:
            self._write_index(sum(sizes.values()))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor into its place, converted to the writer's type.

        Raises:
            OSError: if the disk refuses.
        """
        import torch

        ensure(name not in self._written, f"{name} is written twice")
        ensure(
            tuple(tensor.shape) == self._shapes[name],
            f"{name}: shape {tuple(tensor.shape)} written for {self._shapes[name]}",
        )
        self._written.add(name)
        file, start = self._place[name]
        data = tensor.detach().to(device="cpu", dtype=self._dtype).contiguous().reshape(-1)
        with (self.folder / file).open("r+b") as stream:
            stream.seek(start)
            stream.write(memoryview(data.view(torch.uint8).numpy()))

    def close(self) -> None:
        """Check that every tensor was written, and force the files to the disk."""
        missing = [name for name in self._shapes if name not in self._written]
        ensure(not missing, f"never written: {missing[:3]}")
        for file in sorted({file for file, _ in self._place.values()}):
            with (self.folder / file).open("r+b") as stream:
                _sync(stream)

    def _write_header(self, file: str, sizes: Mapping[str, int]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, size in sizes.items():
            shape = list(self._shapes[name])
            header[name] = {"dtype": self._code, "shape": shape, "data_offsets": [start, start + size]}
            start += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name in sizes:
            self._place[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])
        with (self.folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + start)

    def _write_index(self, total_size: int) -> None:
        index = {
            "metadata": {"total_size": total_size},
            "weight_map": {name: file for name, (file, _) in self._place.items()},
        }
        with (self.folder / INDEX).open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(index, indent=2) + "\n")
            _sync(stream)


def _sync(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())

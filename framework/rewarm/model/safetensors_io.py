"""Reading slices of a sharded safetensors folder, and writing one without ever holding a shard in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from rewarm.errors import UserError, ensure

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BIN = "pytorch_model.bin"
MAX_SHARD_BYTES = 5_000_000_000

BROKEN_FOLDER = "the folder is damaged, or was saved after its training had diverged: take another copy or version"
BROKEN_MODEL = "its training has diverged: take an earlier checkpoint"
"""What to do about weights that are not finite."""

_FLOATS = ("F32", "BF16", "F16")


class NoSafetensors(UserError):
    """A folder has no safetensors that transformers would read."""


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
        self._stored_as: dict[str, str] = {}
        files, index = find_weights(self.folder)
        for file in files:
            for name in self._open(file).keys():  # noqa: SIM118 (not a dict)
                if name in self._file_of:
                    raise UserError(
                        f"{self.folder}: {name} is both in {self._file_of[name]} and in {file}",
                        fix="the folder is a mixture of two downloads: download it again",
                    )
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
        """Shape of every tensor, by name."""
        return {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def types(self) -> dict[str, str]:
        """Type of every tensor by name, as safetensors calls it: ``F32``, ``BF16``, ..."""
        return {name: str(self._slice(name).get_dtype()) for name in self._file_of}

    def check_trainable(self, names: Iterable[str]) -> None:
        """Refuse types that training cannot start from.

        Raises:
            UserError: naming the first tensor that has one.
        """
        types = self.types()
        for name in names:
            if types[name] not in _FLOATS:
                raise UserError(
                    f"{self.folder}: the tensor {name} has type {types[name]}, which cannot be trained",
                    fix="start from the float32, bfloat16 or float16 weights, not from a quantised copy",
                )

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        """A block of one tensor, in the type it is stored in.

        Args:
            name: of a tensor with one dimension, or two where ``columns`` is given.
            rows: range of the first dimension.
            columns: range of the second.
        """
        piece = self._slice(name)
        return piece[rows] if columns is None else piece[rows, columns]

    def whole(self, name: str) -> torch.Tensor:
        """A tensor of any number of dimensions, in the type it is stored in."""
        tensor: torch.Tensor = self._handles[self._file_of[name]].get_tensor(self._stored_as.get(name, name))
        return tensor

    def drop(self, name: str) -> None:
        """Leave a tensor out of :meth:`shapes`."""
        del self._file_of[name]

    def rename(self, name: str, new: str) -> None:
        """Give a tensor under another name."""
        assert new not in self._file_of, new
        self._file_of[new] = self._file_of.pop(name)
        self._stored_as[new] = name

    def _slice(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(self._stored_as.get(name, name))

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(str(self.folder / file), framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / file} cannot be read: {error}", fix="the file is missing or damaged: download it again"
            ) from error
        return self._handles.setdefault(file, handle)


def find_weights(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The safetensors files that transformers reads from a folder, in its order of preference.

    What ``transformers_weights`` of config.json names comes first, then model.safetensors, then the index: an index
    beside model.safetensors is not looked at.

    Returns:
        Names of files, and the file of each tensor where an index says so.

    Raises:
        NoSafetensors: if there are none; the message tells what there is.
        UserError: if the folder is an adapter, the index is damaged, or files that it names are missing.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds adapter_config.json: an adapter, which changes the weights as transformers loads them",
            fix="merge it into its model (merge_and_unload of peft) and save that; or remove the adapter's files",
        )
    named = _named_by_config(folder)
    if named is not None and not named.endswith(".index.json"):
        return [_inside(folder, named, "config.json")], None
    if named is None and (folder / SINGLE).is_file():
        return [SINGLE], None
    index = folder / (named or INDEX)
    if not index.is_file():
        raise NoSafetensors(f"{folder} holds neither {SINGLE} nor {INDEX}", fix=_instead(folder))
    try:
        places = {
            str(name): str(file) for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read: {error}", fix="download the folder again") from error
    files = sorted({_inside(folder, file, index.name) for file in places.values()})
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(files)} files that {index.name} names, first {missing[0]}",
            fix="the download is not complete: download the folder again",
        )
    return files, places


def _named_by_config(folder: Path) -> str | None:
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None  # whoever needs the file reads it, and tells what is wrong with it
    return None if name is None else str(name)


def _inside(folder: Path, file: str, source: str) -> str:
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise UserError(f"{folder / source} names {file}, which is outside of the folder", fix="do not use this folder")
    return file


def _instead(folder: Path) -> str:
    """What a folder without weights has in their place."""
    if (folder / BIN).is_file() or (folder / f"{BIN}.index.json").is_file():
        return f"only safetensors are read; convert {BIN} by loading and saving the model once with transformers"
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if any(name.startswith("model-") for name in found):
        return f"{INDEX} is missing: download it again"
    if found:
        return f"transformers does not read {found[0]} by itself: give the file or its index the name that it looks for"
    if any(folder.glob("*.gguf")):
        return "a .gguf file cannot be trained: download the model that it was made from"
    return "the folder has no weights: download it again"


def check_finite(tensor: torch.Tensor, name: str, source: str, fix: str) -> None:
    """Refuse values that are not finite.

    Args:
        tensor: a part of a weight, or all of it; whole numbers are finite.
        name: of the weight.
        source: where it is from, for the message.
        fix: what to do.

    Raises:
        UserError: naming the tensor.
    """
    import torch

    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise UserError(f"{source}: the tensor {name} holds values that are not finite (NaN or infinity)", fix=fix)


def check_no_nan(tensor: torch.Tensor, name: str, source: str, fix: str) -> None:
    """As :func:`check_finite`, for tensors that may hold infinity, such as the limits of a clipping."""
    import torch

    if tensor.is_floating_point() and torch.isnan(tensor).any():
        raise UserError(f"{source}: the tensor {name} holds values that are not numbers (NaN)", fix=fix)


class TensorWriter:
    """Writes tensors one by one, in any order, into sharded safetensors files laid out in advance.

    The format (8-byte header length, JSON header, raw little-endian data) lets every tensor go straight to its
    place, so that memory never holds more than the tensor being written.

    Args:
        folder: exists.
        shapes: every tensor that will be written, in file order.
        dtype: ``torch.float32`` or ``torch.bfloat16``; tensors are converted to it.
        exact: tensors that keep a type of their own, by name.
        max_shard_bytes: largest file, unless one tensor alone is larger.
    """

    def __init__(
        self,
        folder: str | Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        *,
        exact: Mapping[str, torch.dtype] | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.folder, self._shapes = Path(folder), dict(shapes)
        self._types = dict.fromkeys(shapes, dtype) | dict(exact or {})
        self._place: dict[str, tuple[str, int]] = {}
        self._written: set[str] = set()
        sizes = {name: math.prod(shape) * self._types[name].itemsize for name, shape in shapes.items()}
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
        """Put one tensor into its place, converted to the type it is written in.

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
        data = tensor.detach().to(device="cpu", dtype=self._types[name]).contiguous().reshape(-1)
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
            header[name] = {"dtype": _code(self._types[name]), "shape": shape, "data_offsets": [start, start + size]}
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


def _code(dtype: torch.dtype) -> str:
    import torch

    codes = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    return codes[dtype]


def _sync(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())

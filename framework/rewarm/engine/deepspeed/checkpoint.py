"""Checkpoints that any layout can load: every rank writes its fragments, an index says what lies where.

A folder holds ``index.json``, one ``rank-<r>`` folder of fp32 safetensors per rank, and ``buffers.safetensors`` where
the model has buffers worth keeping. Nothing is gathered to write it; a rank of another stage, rank count, offload or
tensor size reads the ranges that it needs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewarm.engine import ranks
from rewarm.engine.deepspeed.buffers import write_buffers
from rewarm.engine.deepspeed.partitions import Partitions
from rewarm.engine.deepspeed.shards import Shards, place
from rewarm.engine.deepspeed.state import lend
from rewarm.engine.state import MOMENTS, WEIGHT
from rewarm.errors import UserError, ensure
from rewarm.files import parse_json
from rewarm.model.safetensors_io import TensorFolder, TensorWriter

INDEX = "index.json"
_FORMAT = "rewarm deepspeed 1"


def save(
    folder: Path, partitions: Partitions, shards: Shards, description: dict[str, Any], rank: int, *, optimizer: bool
) -> None:
    """Write into an existing empty folder. Collective.

    Raises:
        OSError: on every rank, if one of them could not write.
    """
    spans = {name: span for name, span in partitions.spans().items() if shards.answers_for(name)}
    moments = optimizer and partitions.has_moments
    ranks.on_every_rank(lambda: _write_rank(folder / _rank_folder(rank), partitions, shards, spans, moments))
    parts = ranks.gather({"tensor_rank": shards.rank, "spans": spans})

    def finish() -> None:
        index = {
            "format": _FORMAT,
            "model": description,
            "optimizer": optimizer,
            "moments": moments,
            "steps": partitions.steps() if optimizer else 0,
            "shapes": shards.shapes,
            "cuts": {name: cut.to_dict() for name, cut in shards.maps.items()},
            "ranks": parts,
        }
        (folder / INDEX).write_text(json.dumps(index))
        write_buffers(partitions.module, folder)

    ranks.on_main(finish)


def _rank_folder(rank: int) -> str:
    return f"rank-{rank:05d}"


def _write_rank(
    folder: Path, partitions: Partitions, shards: Shards, spans: dict[str, tuple[int, int]], moments: bool
) -> None:
    folder.mkdir()
    kinds = (WEIGHT, *MOMENTS) if moments else (WEIGHT,)
    shapes = {f"{name}/{kind}": (length,) for name, (_, length) in spans.items() for kind in kinds}
    if not shapes:
        return
    writer = TensorWriter(folder, shapes, torch.float32)
    for each in lend(partitions, shards, kinds, write=False):
        if each.name in spans:
            writer.write(each.key, each.tensor[each.owned])
    writer.close()


class Checkpoint:
    """A folder that :func:`save` wrote, as a source of weights and moments.

    Args:
        folder: the checkpoint.

    Raises:
        UserError: if it is not one.
    """

    def __init__(self, folder: Path) -> None:
        try:
            index = parse_json((folder / INDEX).read_bytes())
            if index["format"] != _FORMAT:
                raise ValueError(f"its format is {index['format']!r}")
            self._take(index)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is not a readable checkpoint of the deepspeed engine: {error}",
                fix=f"name a folder that holds {INDEX}, written by this engine",
            ) from error
        self.folder = folder
        self._open: dict[int, TensorFolder] = {}

    def _take(self, index: dict[str, Any]) -> None:
        self.has_optimizer, self.has_moments = bool(index["optimizer"]), bool(index["moments"])
        self.steps = int(index["steps"])
        self.model: dict[str, Any] = dict(index["model"])
        self.shapes = {name: tuple(shape) for name, shape in dict(index["shapes"]).items()}
        self._cuts: dict[str, Any] = dict(index["cuts"])
        self._ranks: list[dict[str, Any]] = [
            {"tensor_rank": int(part["tensor_rank"]), "spans": dict(part["spans"])} for part in index["ranks"]
        ]

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse another model.

        Raises:
            UserError: naming the first parameter that differs.
        """
        for name in sorted(shapes.keys() | self.shapes.keys()):
            if shapes.get(name) != self.shapes.get(name):
                raise UserError(
                    f"the checkpoint {self.folder} holds another model: {name} has shape {self.shapes.get(name)} "
                    f"there and {shapes.get(name)} here",
                    fix="continue from a run of the same model",
                )

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """See :meth:`rewarm.engine.deepspeed.sources.Source.read`."""
        if name not in self._cuts:
            return self._assemble(name, kind, 0, start, stop)
        from deepspeed.checkpoint.affine import ParamAffineMap

        cut = ParamAffineMap.from_dict(self._cuts[name])
        whole = torch.empty(math.prod(self.shapes[name]))
        for rank, shape in cut.shard_shapes.items():
            place(cut, rank, self._assemble(name, kind, rank, 0, math.prod(shape)), whole)
        return whole[start:stop]

    def _assemble(self, name: str, kind: str, tensor_rank: int, start: int, stop: int) -> Tensor:
        """A range of one tensor rank's shard from the fragments of its data-parallel ranks."""
        found = torch.empty(stop - start)
        covered = 0
        for rank, part in enumerate(self._ranks):
            first, length = part["spans"].get(name, (0, 0))
            low, high = max(start, first), min(stop, first + length)
            if part["tensor_rank"] != tensor_rank or low >= high:
                continue
            found[low - start : high - start] = self._files(rank).read(
                f"{name}/{kind}", slice(low - first, high - first)
            )
            covered += high - low
        ensure(covered == stop - start, f"{self.folder}: {name} is covered in {covered} of {stop - start} elements")
        return found

    def _files(self, rank: int) -> TensorFolder:
        if rank not in self._open:
            self._open[rank] = TensorFolder(self.folder / _rank_folder(rank))
        return self._open[rank]

"""A model's fp32 parameters and moments under their Hugging Face names: what one engine hands to the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewarm.engine.base import Engine
from rewarm.engine.state import MOMENTS, WEIGHT, StateTensor
from rewarm.errors import ensure
from rewarm.model.safetensors_io import TensorFolder, TensorWriter

_INDEX = "portable.json"


class PortableWriter:
    """Writes one tensor at a time.

    Args:
        folder: exists and is empty.
        shapes: of every parameter.
        moments: Adam's moments are written too.
        steps: updates that the moments stand for.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], *, moments: bool, steps: int) -> None:
        self.kinds: Sequence[str] = (WEIGHT, *MOMENTS) if moments else (WEIGHT,)
        names = {f"{name}/{kind}": shape for name, shape in shapes.items() for kind in self.kinds}
        self._writer = TensorWriter(folder, names, torch.float32)
        (folder / _INDEX).write_text(json.dumps({"moments": moments, "steps": steps}))

    def write(self, name: str, kind: str, tensor: Tensor) -> None:
        """Put one whole tensor into its place."""
        self._writer.write(f"{name}/{kind}", tensor)

    def close(self) -> None:
        """Check that everything was written, and force it to the disk."""
        self._writer.close()


def write_portable(
    folder: Path,
    engine: Engine,
    split: Callable[[StateTensor], Iterable[tuple[str, Tensor]]],
    *,
    moments: bool,
    steps: int,
) -> None:
    """Write an engine's state. In one process only, where each tensor is lent whole.

    Args:
        folder: exists and is empty.
        engine: whose state is written.
        split: the Hugging Face tensors that one of the engine's consists of.
        moments: Adam's moments are written too.
        steps: updates that the moments have seen.
    """
    ensure(engine.world_size == 1, "in more processes each would hold a part")
    writer = PortableWriter(folder, engine.parameter_shapes(), moments=moments, steps=steps)
    with engine.state(writer.kinds) as tensors:
        for each in tensors:
            for name, part in split(each):
                writer.write(name, each.kind, part)
    writer.close()


class PortableState:
    """What a :class:`PortableWriter` wrote.

    Attributes:
        kinds: ``weight``, and the moments where they were written.
        steps: updates that the moments stand for.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / _INDEX).read_text())
        self.kinds: Sequence[str] = (WEIGHT, *MOMENTS) if index["moments"] else (WEIGHT,)
        self.steps = int(index["steps"])
        self._tensors = TensorFolder(folder)

    def tensors(self, kind: str) -> PortableTensors:
        """The parameters, or one of their moments."""
        return PortableTensors(self._tensors, kind)

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """A range of a parameter or of a moment of it, flattened: fp32 [stop - start] on the CPU."""
        return self._tensors.read(f"{name}/{kind}").reshape(-1)[start:stop]


class PortableTensors:
    """Tensors of one kind by the names of the parameters; see :class:`rewarm.model.tensors.TensorReader`."""

    def __init__(self, tensors: TensorFolder, kind: str) -> None:
        self._tensors, self._kind = tensors, kind

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """A tensor, or the rows and columns of it that are asked for: fp32 on the CPU."""
        return self._tensors.read(f"{name}/{self._kind}", rows, columns)

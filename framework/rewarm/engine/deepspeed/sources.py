"""Where weights come from: random numbers, a Hugging Face folder or a checkpoint, read range by range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rewarm.errors import UserError
from rewarm.model.initial import RandomTensors
from rewarm.model.safetensors_io import TensorFolder

Shapes = Mapping[str, tuple[int, ...]]


class Source(Protocol):
    """Whole parameters by name, of which any range can be had."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """A range of a parameter, or of a moment of it, flattened in row-major order: [stop - start] on the CPU."""


class RandomWeights:
    """Random weights of a model without parent.

    Args:
        tensors: draws them.
    """

    def __init__(self, tensors: RandomTensors) -> None:
        self._tensors = tensors

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """See :meth:`Source.read`."""
        return self._tensors.draw(name).reshape(-1)[start:stop]


class HuggingFaceWeights:
    """The tensors of a Hugging Face folder whose names are the model's own; only the ranges asked for are read."""

    def __init__(self, folder: TensorFolder, shapes: Shapes) -> None:
        self._folder, self._shapes = folder, shapes

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """See :meth:`Source.read`."""
        shape = self._shapes[name]
        if not shape:
            return self._folder.read(name, slice(None)).reshape(-1)
        row = math.prod(shape[1:])
        first = start // row
        rows = self._folder.read(name, slice(first, -(-stop // row))).reshape(-1)
        return rows[start - first * row : stop - first * row]


class LoadedWeights:
    """Weights that transformers loaded: for folders that it converts as it reads them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """See :meth:`Source.read`."""
        return self._tensors[name].reshape(-1)[start:stop]


def open_huggingface(folder: Path, shapes: Shapes, *, trust_remote_code: bool) -> Source:
    """The weights of a Hugging Face folder.

    Args:
        folder: holds config.json and the weights.
        shapes: of every parameter of the model.
        trust_remote_code: let the folder's Python files run.

    Raises:
        UserError: if the folder's weights are not the model's.
    """
    try:
        tensors = TensorFolder(folder)
        found = tensors.shapes()
    except UserError:
        if any(folder.glob("*.safetensors")):
            raise
        return _load(folder, shapes, trust_remote_code)
    if all(tuple(found.get(name, ())) == tuple(shape) for name, shape in shapes.items()):
        return HuggingFaceWeights(tensors, shapes)
    return _load(folder, shapes, trust_remote_code)


def _load(folder: Path, shapes: Shapes, trust_remote_code: bool) -> LoadedWeights:
    from transformers import AutoModelForCausalLM

    from rewarm.model.reference import quiet_transformers

    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"transformers cannot load {folder}: {reason}", fix="give a Hugging Face model folder"
        ) from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            name = sorted(str(key) for key in report[kind])[0]
            raise UserError(
                f"{folder}: {kind.replace('_', ' ')} of the weights, first {name}",
                fix="the folder is incomplete or its config.json belongs to another model",
            )
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wrong = [name for name, shape in shapes.items() if name not in tensors or tuple(tensors[name].shape) != shape]
    if wrong:
        raise UserError(
            f"{folder} holds no tensor {wrong[0]} of shape {shapes[wrong[0]]}, which the model has",
            fix="continue from the folder that the run's model came from",
        )
    return LoadedWeights(tensors)

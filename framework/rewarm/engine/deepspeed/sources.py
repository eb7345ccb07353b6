"""Where weights come from: random numbers, a Hugging Face folder or a checkpoint, read range by range."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rewarm.engine.deepspeed.buffers import aliases, persistent_buffers
from rewarm.errors import UserError
from rewarm.model.initial import RandomTensors
from rewarm.model.safetensors_io import BIN, NoSafetensors, TensorFolder

_FOLLOWS = ".rotary_emb.inv_freq"
"""What old folders hold although it follows from config.json."""

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
            return self._folder.whole(name).reshape(-1)
        row = math.prod(shape[1:])
        first = start // row
        rows = self._folder.read(name, slice(first, -(-stop // row))).reshape(-1)
        return rows[start - first * row : stop - first * row]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See :meth:`ImportedWeights.tensors`."""
        return {name: self._folder.whole(name) for name in names}


class LoadedWeights:
    """Weights that transformers loaded: for folders that it converts as it reads them."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """See :meth:`Source.read`."""
        return self._state[name].reshape(-1)[start:stop]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See :meth:`ImportedWeights.tensors`."""
        return {name: self._state[name] for name in names if name in self._state}


class ImportedWeights(Source, Protocol):
    """A model's whole state as a Hugging Face folder has it."""

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors by name, in the type they are stored in."""


def open_huggingface(folder: Path, shapes: Shapes, module: nn.Module, *, trust_remote_code: bool) -> ImportedWeights:
    """The weights of a Hugging Face folder.

    Files whose tensors are the model's, name for name, are read in ranges. Anything else is left to transformers to
    convert, or to refuse.

    Args:
        folder: holds config.json and the weights.
        shapes: of every parameter of the model.
        module: the model, for its buffers and for what it ties.
        trust_remote_code: let the folder's Python files run.

    Raises:
        UserError: if the folder's weights are not the model's.
    """
    needed = {name: tuple(shape) for name, shape in shapes.items()}
    needed |= {name: tuple(buffer.shape) for name, buffer in persistent_buffers(module).items()}
    try:
        tensors = TensorFolder(folder)
    except NoSafetensors:
        if not any((folder / name).is_file() for name in (BIN, f"{BIN}.index.json")):
            raise
        return _load(folder, needed, trust_remote_code)
    found = tensors.shapes()
    tied = aliases(module)
    surplus = [name for name in found if name not in needed and name not in tied and not name.endswith(_FOLLOWS)]
    if surplus or any(found.get(name) != shape for name, shape in needed.items()):
        return _load(folder, needed, trust_remote_code)
    tensors.check_trainable(shapes)
    for name in tied.keys() & found.keys():
        if not torch.equal(tensors.whole(name), tensors.whole(tied[name])):
            raise _not_tied(folder, name, tied[name])
    return HuggingFaceWeights(tensors, shapes)


def _not_tied(folder: Path, name: str, other: str) -> UserError:
    return UserError(
        f"{folder}: the model uses one tensor as {name} and {other}, but they differ in the files",
        fix="set tie_word_embeddings to false in config.json if the output layer was trained on its own",
    )


def _load(folder: Path, shapes: Shapes, trust_remote_code: bool) -> LoadedWeights:
    """What transformers makes of a folder. Every rank holds all of it in host memory, and transformers says what it
    could not use."""
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
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(kind):
            name = sorted(str(key) for key in report[kind])[0]
            raise UserError(
                f"{folder}: {kind.replace('_', ' ')} of the weights, first {name}",
                fix="the folder is incomplete or its config.json belongs to another model",
            )
    state = model.state_dict()
    wrong = [name for name, shape in shapes.items() if name not in state or tuple(state[name].shape) != shape]
    if wrong:
        raise UserError(
            f"{folder} holds no tensor {wrong[0]} of shape {shapes[wrong[0]]}, which the model has",
            fix="continue from the folder that the run's model came from",
        )
    for name, _ in model.named_parameters():
        if name not in shapes:  # transformers does not tie what differs
            raise _not_tied(folder, name, "another one")
    return LoadedWeights(state)

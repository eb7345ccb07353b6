"""Writing a Hugging Face folder, one parameter at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewarm.data.model_folder import list_files
from rewarm.engine import device, ranks
from rewarm.engine.deepspeed.buffers import persistent_buffers
from rewarm.engine.deepspeed.shards import Shards
from rewarm.errors import UserError
from rewarm.model.description import HuggingFaceModel
from rewarm.model.files import carry_files, written_aside
from rewarm.model.safetensors_io import BROKEN_MODEL, TensorWriter, check_finite, check_no_nan


@dataclass(frozen=True, slots=True)
class Companions:
    """What goes along with the weights."""

    tokenizer: Path | None
    """Folder whose tokenizer, generation and licence files are copied."""
    lineage: Path | None
    """The lineage.json."""


def export_model(
    module: nn.Module,
    shards: Shards,
    model: HuggingFaceModel,
    folder: Path,
    dtype: str,
    *,
    files: Companions,
    replace: bool,
) -> None:
    """Write a folder that ``AutoModelForCausalLM`` loads; it takes its name only when it is whole. Collective.

    No device and no host ever holds more than one whole parameter beside its own part.

    Args:
        module: the model.
        shards: its cut over the tensor ranks.
        model: gives config.json.
        folder: the name it gets; only rank 0's disk is used.
        dtype: ``float32`` or ``bfloat16``, of the parameters written; buffers keep their own.
        files: what goes along.
        replace: take the place of what is there.

    Raises:
        UserError: on every rank, if the folder exists or cannot be written, or a weight is not finite.
    """
    buffers = persistent_buffers(module)
    with ExitStack() as stack:

        def begin() -> TensorWriter:
            aside = stack.enter_context(written_aside(folder, replace=replace))
            (aside / "config.json").write_text(json.dumps(_config(model, dtype), indent=2) + "\n", encoding="utf-8")
            _copy_companions(files, model, aside)
            shapes = {name: tuple(value.shape) for name, value in buffers.items()} | shards.shapes
            exact = {name: value.dtype for name, value in buffers.items()}
            return TensorWriter(aside, shapes, device.dtype_of(dtype), exact=exact)

        writer = ranks.on_main(begin)
        problem: Exception | None = None
        for name, tensor in _whole_parameters(module, shards):
            problem = problem or _attempt(writer, name, tensor)
        for name, tensor in buffers.items():
            problem = problem or _attempt(writer, name, tensor, check_no_nan)
        ranks.raise_on_every_rank(problem)

        def finish() -> None:
            assert writer is not None
            writer.close()
            stack.close()

        ranks.on_main(finish)


def _attempt(
    writer: TensorWriter | None, name: str, tensor: Tensor, check: Callable[..., None] = check_finite
) -> Exception | None:
    """Write where there is a writer. What goes wrong is remembered, since the other ranks go on gathering."""
    try:
        if writer is not None:
            check(tensor, name, "the model", BROKEN_MODEL)
            writer.write(name, tensor)
    except (OSError, UserError) as error:
        return error
    return None


def _whole_parameters(module: nn.Module, shards: Shards) -> Iterator[tuple[str, Tensor]]:
    """Every parameter as it was before ZeRO and AutoTP cut it. Collective."""
    from deepspeed.runtime.zero import GatheredParameters

    for name, parameter in module.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")), torch.no_grad():
            yield name, shards.join(name, parameter.detach())


def _config(model: HuggingFaceModel, dtype: str) -> dict[str, Any]:
    """config.json with the type that the tensors are written in, under the key of either transformers version."""
    values = dict(model.config)
    values.pop("dtype", None)
    return values | {"torch_dtype": dtype}


def _copy_companions(files: Companions, model: HuggingFaceModel, target: Path) -> None:
    if files.tokenizer is not None:
        carry_files(files.tokenizer, target)
    if files.lineage is not None:
        shutil.copyfile(files.lineage, target / "lineage.json")
    for name, path in list_files(model.code_folder, ("*.py",)).items() if model.code_folder else ():
        shutil.copyfile(path, target / name)

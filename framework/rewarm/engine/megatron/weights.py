"""Hugging Face tensors to the shards of live Megatron-Core chunks and back, one parameter at a time.

Megatron joins what Hugging Face keeps apart: query, key and value interleaved by key-value group, gate and up
projections one above the other; and it cuts the result over the tensor ranks: by rows (embedding, output, qkv, gate
and up, each half on its own) or by columns (attention output, down projection).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, assert_never

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rewarm.engine import ranks
from rewarm.errors import UserError, ensure
from rewarm.model.architecture import Architecture
from rewarm.model.families.base import Split, family_of
from rewarm.model.files import carry_files, written_aside
from rewarm.model.huggingface import config_for_huggingface
from rewarm.model.safetensors_io import BROKEN_FOLDER, BROKEN_MODEL, TensorFolder, TensorWriter, check_finite
from rewarm.model.tensors import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    TensorReader,
    layer_prefix,
    open_weights,
    tensor_shapes,
)

_T = TypeVar("_T")
_DISK = "check the permissions and the free space"

SetMain = Callable[[torch.nn.Parameter, torch.Tensor], None]
"""Takes a local parameter and its values, fp32 [as the parameter], for the optimizer."""


@dataclass(frozen=True, slots=True)
class Place:
    """What one Megatron parameter is made of, and how it is cut over the tensor ranks."""

    split: Split
    names: tuple[str, ...]


def import_weights(
    chunks: Sequence[torch.nn.Module], architecture: Architecture, folder: str | Path, set_main: SetMain | None = None
) -> None:
    """Fill live Megatron chunks from a Hugging Face folder; each rank reads only the rows and columns it holds.

    Parameters get the values in their own type; rows that pad the vocabulary become 0. No collective.

    Args:
        chunks: this rank's GPTModel chunks, wrapped or not, in the order of the virtual pipeline.
        architecture: what they were built from.
        folder: config.json and safetensors.
        set_main: takes each parameter's values in fp32 for the optimizer, before they are rounded to its own type.

    Raises:
        UserError: if the folder's tensors are not exactly the architecture's, or one of those that this rank reads
            holds values that are not finite.
    """
    with open_weights(folder, architecture) as weights:
        fill_weights(chunks, architecture, _Finite(weights), set_main)


def fill_weights(
    chunks: Sequence[torch.nn.Module],
    architecture: Architecture,
    weights: TensorReader,
    set_main: SetMain | None = None,
) -> None:
    """Fill live Megatron chunks from Hugging Face tensors, as :func:`import_weights` does. No collective.

    Args:
        chunks: as for :func:`import_weights`.
        architecture: what they were built from.
        weights: has every tensor of the architecture.
        set_main: as for :func:`import_weights`.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    filled: set[str] = set()
    with torch.no_grad():
        for place, parameter in places(chunks, architecture):
            shard = read_shard(weights, place, parameter, architecture, rank)
            ensure(
                shard.shape == parameter.shape,
                f"{place.names}: shape {tuple(shard.shape)} read for {tuple(parameter.shape)}",
            )
            parameter.copy_(shard)
            if set_main is not None:
                set_main(parameter, shard.float())
            filled.update(place.names)
    missing = _local_names(chunks, architecture) - filled
    ensure(not missing, f"the model has no parameter for {sorted(missing)[:3]}")


class _Finite:
    """Tensors of a folder, of which a block that is not finite is refused; see :class:`TensorReader`."""

    def __init__(self, weights: TensorFolder) -> None:
        self._weights = weights

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        block = self._weights.read(name, rows, columns)
        check_finite(block, name, str(self._weights.folder), BROKEN_FOLDER)
        return block


def export_weights(
    chunks: Sequence[torch.nn.Module], architecture: Architecture, folder: str | Path, dtype: torch.dtype
) -> None:
    """Write the model as sharded safetensors in Hugging Face's names. Collective.

    One parameter at a time is gathered over the tensor ranks of its pipeline stage, sent to rank 0 and written
    straight to its place, so that no device and no host ever holds more than one whole parameter. Model parameters
    are exported: in a bfloat16 run those are the rounded copies of the fp32 main parameters that the forward pass
    uses, whatever ``dtype`` is.

    Args:
        chunks: as for :func:`import_weights`.
        architecture: what they were built from.
        folder: an existing folder; only rank 0's is used.
        dtype: ``torch.float32`` or ``torch.bfloat16``, of the tensors written.

    Raises:
        UserError: on every rank, if rank 0 cannot write, or a weight is not finite.
    """
    problem = _stream(chunks, architecture, Path(folder), dtype) if _in_first_replica() else None
    ranks.raise_on_every_rank(problem)


def export_model(
    chunks: Sequence[torch.nn.Module],
    architecture: Architecture,
    folder: str | Path,
    dtype: torch.dtype,
    *,
    tokenizer: Path | None = None,
    lineage: Path | None = None,
    replace: bool = False,
) -> None:
    """Write a whole Hugging Face folder, which takes its name only when everything in it is on the disk. Collective.

    Args:
        chunks: as for :func:`import_weights`.
        architecture: what they were built from.
        folder: the name it gets; only rank 0's disk is used.
        dtype: as for :func:`export_weights`.
        tokenizer: a folder whose tokenizer, generation and licence files go along; None means none.
        lineage: the lineage.json that goes along, so that a stage which continues the export knows its ancestors.
        replace: take the place of what is there, instead of refusing.

    Raises:
        UserError: on every rank, if the folder exists or cannot be written.
    """
    with ExitStack() as stack:  # on an error the half-written folder goes

        def begin() -> Path:
            aside = stack.enter_context(written_aside(folder, replace=replace))
            config = config_for_huggingface(architecture, str(dtype).removeprefix("torch."))
            (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                carry_files(tokenizer, aside)
            if lineage is not None:
                shutil.copyfile(lineage, aside / "lineage.json")
            return aside

        aside = _on_main(begin)
        export_weights(chunks, architecture, aside or folder, dtype)
        _on_main(stack.close)


def _on_main(action: Callable[[], _T]) -> _T | None:
    """What the action returns on rank 0; a file that cannot be written is the user's to see to. Collective."""

    def attempt() -> _T:
        try:
            return action()
        except OSError as problem:
            raise UserError(f"cannot write {problem.filename}: {problem.strerror or problem}", fix=_DISK) from problem

    return ranks.on_main(attempt)


class _Sink:
    """A :class:`TensorWriter` on rank 0 and nothing elsewhere, that remembers what went wrong instead of raising.

    A full disk must not leave the other ranks waiting, so everything is still received after an error.
    """

    def __init__(self, architecture: Architecture, folder: Path, dtype: torch.dtype) -> None:
        self.problem: UserError | None = None
        self._folder = folder
        self._writer: TensorWriter | None = None
        if dist.get_rank() == 0:
            with self._remembering():
                self._writer = TensorWriter(folder, tensor_shapes(architecture), dtype)

    def write(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        with self._remembering():
            for name, tensor in zip(names, tensors, strict=True):
                if self._writer is not None and self.problem is None:
                    check_finite(tensor, name, "the model", BROKEN_MODEL)
                    self._writer.write(name, tensor)

    def close(self) -> UserError | None:
        with self._remembering():
            if self._writer is not None and self.problem is None:
                self._writer.close()
        return self.problem

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.problem = error
        except OSError as error:
            problem = f"cannot write the weights into {self._folder}: {error.strerror or error}"
            self.problem = UserError(problem, fix=_DISK)


def _stream(
    chunks: Sequence[torch.nn.Module], architecture: Architecture, folder: Path, dtype: torch.dtype
) -> UserError | None:
    """Bring every parameter to rank 0 and write it there; returns what went wrong with the files, if anything."""
    local = {place: parameter.detach() for place, parameter in places(chunks, architecture)}
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * dist.get_world_size(pipeline)
    dist.all_gather_object(stages, [(place, whole_shape(place, p)) for place, p in local.items()], group=pipeline)
    some = next(iter(local.values()))
    sink, seen = _Sink(architecture, folder, dtype), set()
    for stage, held in enumerate(stages):
        for place, shape in held:
            if place.names in seen:  # the last stage's copy of a tied embedding
                continue
            seen.add(place.names)
            whole = _gather(local[place], place) if stage == dist.get_rank(pipeline) else None
            if stage > 0:
                whole = _send_to_first_stage(whole, stage, shape, some)
            if whole is not None:
                sink.write(place.names, take_apart(whole, place, architecture))
    return sink.close()


def _gather(parameter: torch.Tensor, place: Place) -> torch.Tensor | None:
    """The shards of all tensor ranks as one parameter, on the first of them; None on the others."""
    group = parallel_state.get_tensor_model_parallel_group()
    leads = dist.get_rank(group) == 0
    if place.split == "whole" or dist.get_world_size(group) == 1:
        return parameter if leads else None
    shards = [torch.empty_like(parameter) for _ in range(dist.get_world_size(group))] if leads else None
    dist.gather(parameter.contiguous(), shards, dst=dist.get_global_rank(group, 0), group=group)
    if shards is None:
        return None
    if place.split == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(shards, dim=1 if place.split == "columns" else 0)


def whole_shape(place: Place, parameter: torch.Tensor) -> tuple[int, ...]:
    size = parallel_state.get_tensor_model_parallel_world_size()
    shape = tuple(parameter.shape)
    if place.split == "whole":
        return shape
    return (shape[0], shape[1] * size) if place.split == "columns" else (shape[0] * size, *shape[1:])


def _send_to_first_stage(
    whole: torch.Tensor | None, stage: int, shape: tuple[int, ...], like: torch.Tensor
) -> torch.Tensor | None:
    """Move a gathered parameter of a later stage to rank 0; None on every other rank."""
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return None
    group = parallel_state.get_pipeline_model_parallel_group()
    first, source = dist.get_global_rank(group, 0), dist.get_global_rank(group, stage)
    if whole is not None:
        dist.send(whole.contiguous(), dst=first, group=group)
        return None
    if dist.get_rank() != first:
        return None
    received = torch.empty(shape, dtype=like.dtype, device=like.device)
    dist.recv(received, src=source, group=group)
    return received


def take_apart(whole: torch.Tensor, place: Place, architecture: Architecture) -> list[torch.Tensor]:
    """A whole Megatron parameter as the Hugging Face tensors it is made of."""
    if place.split == "vocabulary":
        return [whole[: architecture.vocab_size]]
    if place.split == "gate_up":
        return list(whole.chunk(2))
    if place.split == "qkv":
        per_group = architecture.num_attention_heads // architecture.num_key_value_heads
        rest = whole.shape[1:]
        grouped = whole.view(architecture.num_key_value_heads, per_group + 2, architecture.head_dim, *rest)
        return [part.reshape(-1, *rest) for part in grouped.split([per_group, 1, 1], dim=1)]
    if place.split == "whole" or place.split == "columns":
        return [whole]
    assert_never(place.split)


def read_shard(
    weights: TensorReader,
    place: Place,
    parameter: torch.Tensor,
    architecture: Architecture,
    rank: int,
) -> torch.Tensor:
    """One tensor rank's shard of a parameter, [as the parameter], in the type it is stored in."""
    if place.split == "whole":
        return weights.read(place.names[0])
    if place.split == "columns":
        width = parameter.shape[1]
        return weights.read(place.names[0], columns=slice(rank * width, (rank + 1) * width))
    rows = parameter.shape[0]
    if place.split == "gate_up":
        half = slice(rank * rows // 2, (rank + 1) * rows // 2)
        return torch.cat([weights.read(name, half) for name in place.names])
    if place.split == "qkv":
        return _read_qkv(weights, place, rows, architecture, rank)
    if place.split == "vocabulary":
        start = min(rank * rows, architecture.vocab_size)
        stop = min(start + rows, architecture.vocab_size)
        read = weights.read(place.names[0], slice(start, stop))
        return torch.cat([read, read.new_zeros(rows - (stop - start), read.shape[1])])
    assert_never(place.split)


def _read_qkv(weights: TensorReader, place: Place, rows: int, architecture: Architecture, rank: int) -> torch.Tensor:
    """Rows ``[rank * rows, (rank + 1) * rows)`` of query, key and value interleaved by group.

    With more tensor ranks than groups a shard ends inside a group; then the groups it touches are read.
    """
    head = architecture.head_dim
    per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    group_rows = (per_group + 2) * head
    first, last = rank * rows // group_rows, -(-(rank + 1) * rows // group_rows)
    parts = []
    for name, heads in zip(place.names, (per_group, 1, 1), strict=True):
        part = weights.read(name, slice(first * heads * head, last * heads * head))
        parts.append(part.view(last - first, heads * head, *part.shape[1:]))
    joined = torch.cat(parts, dim=1).flatten(0, 1)
    start = rank * rows - first * group_rows
    return joined[start : start + rows]


def places(chunks: Sequence[torch.nn.Module], architecture: Architecture) -> Iterator[tuple[Place, torch.nn.Parameter]]:
    """Every local parameter with what it is made of."""
    for chunk in _unwrapped(chunks):
        for name, parameter in chunk.named_parameters():
            yield _place(chunk, name, architecture), parameter


def _place(chunk: Any, name: str, architecture: Architecture) -> Place:
    if name == "embedding.word_embeddings.weight":
        return Place("vocabulary", (EMBEDDING,))
    if name == "output_layer.weight":
        return Place("vocabulary", (EMBEDDING if architecture.tie_embeddings else OUTPUT,))
    if name == "decoder.final_layernorm.weight":
        return Place("whole", (FINAL_NORM,))
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    known = family_of(architecture).parameters()
    assert match is not None and match.group(2) in known, f"no Hugging Face tensor is known for parameter {name}"
    split, names = known[match.group(2)]
    prefix = layer_prefix(chunk.decoder.layers[int(match.group(1))].layer_number - 1)
    return Place(split, tuple(prefix + part for part in names))


def _local_names(chunks: Sequence[torch.nn.Module], architecture: Architecture) -> set[str]:
    """Hugging Face tensors that belong on this rank, counted from the architecture and not from the parameters."""
    names: set[str] = set()
    every = list(tensor_shapes(architecture))
    for chunk in _unwrapped(chunks):
        if chunk.pre_process:
            names.add(EMBEDDING)
        if chunk.post_process:
            names |= {FINAL_NORM, EMBEDDING if architecture.tie_embeddings else OUTPUT}
        for layer in chunk.decoder.layers:
            prefix = layer_prefix(layer.layer_number - 1)
            names |= {name for name in every if name.startswith(prefix)}
    return names


def _unwrapped(chunks: Sequence[torch.nn.Module]) -> list[Any]:
    from megatron.core.utils import unwrap_model

    return list(unwrap_model(list(chunks)))


def _in_first_replica() -> bool:
    """True on the ranks of the one model copy that is exported."""
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0

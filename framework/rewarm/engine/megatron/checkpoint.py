"""Sharded checkpoints in Megatron-Core's format, written in this process and failing on every rank or on none."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import save as save_sharded

from rewarm.engine import ranks
from rewarm.engine.megatron.optimizer import Optimizer
from rewarm.engine.megatron.sharded_reader import TensorsOnly, check_metadata
from rewarm.engine.megatron.transformer import Decoder
from rewarm.engine.megatron.weights import places
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.safetensors_io import BROKEN_MODEL, check_finite

_FORMAT = CheckpointingConfig("torch_dist", 1)
_EXTRA = "_extra_state"


def _metadata() -> dict[str, Any]:
    return {
        # Any layout can load it; the moments of a data-parallel group meet on its first rank only.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_state(chunks: Sequence[Decoder]) -> dict[str, Any]:
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    state = {name: chunk.sharded_state_dict(metadata=_metadata()) for name, chunk in zip(names, chunks, strict=True)}
    # What layers keep beside their weights is for FP8, which is not used here, and would be pickled.
    return {
        name: {key: value for key, value in entries.items() if not key.endswith(_EXTRA)}
        for name, entries in state.items()
    }


def save(folder: Path, architecture: Architecture, chunks: Sequence[Decoder], optimizer: Optimizer | None) -> None:
    """Write into an existing empty folder. Collective.

    Raises:
        OSError: on every rank, if one of them could not write.
    """
    state = _model_state(chunks)
    if optimizer is not None:
        moments = optimizer.sharded.sharded_state_dict(state, metadata=_metadata())
        if moments["param_state"] is None:
            del moments["param_state"]  # only the first rank of a data-parallel group holds it
        state["optimizer"] = moments
    state["rewarm"] = {"architecture": architecture.to_dict(), "optimizer": optimizer is not None}
    sharded, common = save_preprocess(state, preprocess_common_before_consistancy_check=_same_on_all_ranks)
    ranks.on_main(lambda: _write_common(common, folder))
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    try:
        save_sharded(
            mcore_to_pyt_state_dict(flat, False),
            storage_writer=_Writer(folder, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    except CheckpointException as failure:
        raise _first_failure(failure) from failure
    ranks.on_main(lambda: save_config(_FORMAT, str(folder)))


def _same_on_all_ranks(common: dict[str, Any]) -> dict[str, Any]:
    """What all ranks agree on; the skeleton of the moments is only on the first rank of a data-parallel group."""
    return {"rewarm": common["rewarm"]}


def _write_common(common: dict[str, Any], folder: Path) -> None:
    """The part that is not sharded, through memory: given a path, torch hides the errno of a failed write."""
    content = io.BytesIO()
    torch.save(common, content)
    with open(folder / COMMON_STATE_FNAME, "wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())


class _Writer(FileSystemWriter):
    """torch's writer, which writes in this process (Megatron-Core's starts a manager and workers for each save).

    A failed write reaches the other ranks pickled, which drops what an exception was caused by: the errno is dug out
    before.
    """

    def write_data(self, plan: Any, planner: Any) -> Any:
        """See the base class."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _os_error(error) or error from None

    def finish(self, metadata: Any, results: Any) -> None:
        """See the base class."""
        try:
            super().finish(metadata, results)
        except Exception as error:
            raise _os_error(error) or error from None


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _first_failure(failure: CheckpointException) -> Exception:
    """torch's collection of failures as one ordinary exception; an ``OSError`` stays one."""
    rank, (error, _) = min(failure.failures.items())
    return error if isinstance(error, OSError) else RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")


def load(
    folder: Path, architecture: Architecture, chunks: Sequence[Decoder], optimizer: Optimizer, *, moments: bool
) -> None:
    """Read what :func:`save` wrote, on this or another layout. Collective.

    The weights are the fp32 main parameters of the run that wrote it, where it wrote the optimizer's state: a bfloat16
    model has their rounded values, from which a new stage would not start where the old one ended.

    Args:
        folder: the checkpoint.
        architecture: of the model.
        chunks: its parts on this rank.
        optimizer: over them.
        moments: go on with the optimizer's state; else it stays as it is.

    Raises:
        UserError: if the folder is no such checkpoint, holds another model, lacks the optimizer's state, or holds
            values that are not finite.
    """
    contents = ranks.on_every_rank(lambda: _check(folder, architecture, moments))
    state = _model_state(chunks)
    if moments:
        request = {**state, "optimizer": optimizer.sharded.sharded_state_dict(state, True, metadata=_metadata())}
    else:
        request = _fp32_state(state, "optimizer.state.param." if contents["optimizer"] else "")
    error: Exception | None = None
    try:
        loaded = dist_checkpointing.load(request, str(folder), TensorsOnly())
    except CheckpointException as failure:
        error = UserError(f"the checkpoint {folder} cannot be read: {_first_failure(failure)}")
    except (CheckpointingException, UnpicklingError, KeyError, EOFError, OSError, RuntimeError) as failure:
        error = UserError(f"the checkpoint {folder} cannot be read: {type(failure).__name__}: {failure}")
    ranks.raise_on_every_rank(error)
    for name, chunk in zip(state, chunks, strict=True):
        chunk.load_state_dict(loaded[name] | dict.fromkeys(_extra_keys(chunk)))
    with torch.no_grad():
        if moments:
            optimizer.sharded.load_state_dict(loaded["optimizer"])
            optimizer.apply_settings()
        else:
            _set_main_parameters(optimizer, [loaded[name] for name in state], chunks)
    ranks.on_every_rank(lambda: _check_finite(folder, architecture, chunks, optimizer, moments=moments))


def _extra_keys(chunk: Decoder) -> list[str]:
    """Names under which layers expect more than their weights; None stands for nothing there."""
    return [
        f"{name}.{_EXTRA}"
        for name, part in chunk.named_modules()
        if type(part).set_extra_state is not torch.nn.Module.set_extra_state
    ]


@torch.no_grad()
def _check_finite(
    folder: Path, architecture: Architecture, chunks: Sequence[Decoder], optimizer: Optimizer, *, moments: bool
) -> None:
    """Refuse what nothing can go on from."""
    source = f"the checkpoint {folder}"
    for place, parameter in places(chunks, architecture):
        check_finite(parameter, place.names[0], source, BROKEN_MODEL)
        if moments and optimizer.has_moments:
            for kind, values in optimizer.state_of(parameter).items():
                check_finite(values, f"{place.names[0]} ({kind})", source, BROKEN_MODEL)


def _fp32_state(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A request for the weights in fp32, whatever type the parameters have.

    Args:
        state: of the model.
        prefix: of the keys: that of the fp32 main parameters, under the names by which Megatron-Core's optimizer saves
            them, or none.
    """

    def main(entry: Any) -> Any:
        if not isinstance(entry.data, torch.nn.Parameter):
            return entry
        # Zeros, because rows that pad the vocabulary here may not be there; on the host, because a device may have no
        # room for all of them.
        fields = {
            "key": f"{prefix}{entry.key}",
            "data": torch.zeros_like(entry.data, dtype=torch.float32, device="cpu"),
        }
        if isinstance(entry, ShardedTensor):
            fields["dtype"] = torch.float32
        return replace(entry, **fields)

    return {name: {key: main(entry) for key, entry in chunk.items()} for name, chunk in state.items()}


def _set_main_parameters(
    optimizer: Optimizer, loaded: Sequence[dict[str, torch.Tensor]], chunks: Sequence[Decoder]
) -> None:
    """Set this rank's shards of the main parameters, and leave the moments as they are."""
    values = {
        parameter: weights[name]
        for chunk, weights in zip(chunks, loaded, strict=True)
        for name, parameter in chunk.named_parameters()
    }
    for parameter, weights in values.items():
        optimizer.set_main(parameter, weights.float())


def _check(folder: Path, architecture: Architecture, need_optimizer: bool) -> dict[str, Any]:
    """What the checkpoint says of itself."""
    try:
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(folder))["rewarm"]
        check_metadata(folder)  # by itself: inside its loading torch prints a stack trace for what is refused here
    except (CheckpointingException, UnpicklingError, OSError, KeyError, TypeError, EOFError, RuntimeError) as failure:
        raise UserError(
            f"{folder} is not a readable checkpoint of the megatron engine: {failure}",
            fix="name a folder that holds metadata.json and common.pt, written by this engine",
        ) from failure
    found, expected = common["architecture"], architecture.to_dict()
    for name, value in expected.items():
        # None of them changes a weight or its shape.
        if name in ("initializer_range", "max_position_embeddings", "huggingface_config"):
            continue
        if found.get(name) != value:
            raise UserError(
                f"the checkpoint {folder} holds another model: {name}={found.get(name)}, expected {value}",
                fix="continue from a run of the same model",
            )
    if need_optimizer and not common["optimizer"]:
        raise UserError(
            f"the checkpoint {folder} was saved without the optimizer's state",
            fix="set optimizer_state=reset, or name a checkpoint that has it",
        )
    return common

"""Joining the process group that the environment describes, or a group of one."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rewarm.engine import device
from rewarm.errors import UserError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_world_size() -> int:
    """Ranks that the environment announces: ``WORLD_SIZE`` as torchrun sets it, or 1 without it.

    Raises:
        UserError: if only some of torchrun's variables are set, or they are not numbers in range.
    """
    present = [name for name in _VARIABLES if os.environ.get(name)]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return 1
    missing = sorted(set(_VARIABLES) - set(present))
    if missing:
        raise UserError(
            f"the environment sets {', '.join(present)} but not {', '.join(missing)}",
            fix="start the ranks with torchrun or rewarm, or unset RANK and WORLD_SIZE for a single process",
        )
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        rank, size = 0, -1
    if not 0 <= rank < size:
        raise UserError(f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} do not fit together")
    return size


def join(timeout_minutes: float) -> None:
    """Join the default process group, unless this process is in one already.

    Args:
        timeout_minutes: minutes until a collective that a lost rank never joins fails.
    """
    if dist.is_initialized():
        return
    size = environment_world_size()
    local = device.activate()
    backend = device.communication_backend()
    timeout = timedelta(minutes=timeout_minutes)
    options: dict[str, Any] = {"device_id": local} if local.type == "cuda" else {}
    if size == 1 and "RANK" not in os.environ:
        # An in-memory store: a single process needs no port that another one may hold.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, **options)
        return
    if local.type == "cuda":
        # Megatron-Core's overlap of tensor-parallel communication relies on one hardware queue per device.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    try:
        dist.init_process_group(backend, timeout=timeout, **options)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise UserError(
            f"rank {os.environ['RANK']} could not meet the other {size - 1} at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}",
            fix="check that every rank was started and that the port is free and reachable",
        ) from error


def any_rank(flag: bool) -> bool:
    """True on every rank if the flag is true on one of them. Collective."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor([int(flag)], device=device.local_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks, in place and returned. Collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's picklable value, on every rank. Collective."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device.local_device())
    return box[0]


def raise_on_every_rank(error: Exception | None) -> None:
    """Raise on all ranks if one of them brings an error: its own there, a copy elsewhere. Collective.

    An :class:`OSError` stays one (with its errno) and a :class:`~rewarm.errors.UserError` stays one, so that every
    rank takes the same way out; anything else becomes a ``RuntimeError`` on the ranks that did not fail.
    """
    if not any_rank(error is not None):
        return
    summary = None if error is None else _summary(error)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, summary)
    if error is not None:
        raise error
    rank, (kind, arguments) = next((rank, entry) for rank, entry in enumerate(found) if entry is not None)
    if kind == "os":
        raise OSError(*arguments)
    if kind == "user":
        raise UserError(arguments[0], fix=arguments[1])
    raise RuntimeError(f"rank {rank}: {arguments[0]}")


def _summary(error: Exception) -> tuple[str, tuple[Any, ...]]:
    if isinstance(error, OSError):
        return "os", (error.errno, error.strerror or str(error), error.filename and str(error.filename))
    if isinstance(error, UserError):
        return "user", (error.message, error.fix)
    return "other", (f"{type(error).__name__}: {error}",)

"""Joining the process group that the environment describes, or a group of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rewarm.engine import device, gpus
from rewarm.engine.environment import this_node
from rewarm.errors import NodeFault, UserError

T = TypeVar("T")


def join(timeout_minutes: float) -> None:
    """Join the default process group, unless this process is in one already.

    torchrun's variables (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``) say which; without them it is a
    group of one.

    Args:
        timeout_minutes: minutes until a collective that a lost rank never joins fails; of this group and of every
            group that is made later.
    """
    limit = timedelta(minutes=timeout_minutes)
    _give_to_new_groups(limit)
    if dist.is_initialized():
        return
    # Megatron-Core's overlap of tensor-parallel communication relies on one hardware queue per device, and it warns
    # where this is unset.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "RANK" not in os.environ:
        # An in-memory store: a single process needs no port that another one may hold.
        _join(dist.HashStore(), 0, 1, limit)
        return
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        _join(store, rank, world_size, limit)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE')} could not meet the others at {meeting}: "
            f"{str(error).splitlines()[0]}",
            fix="check that every rank was started and that the address and the port are free and reachable",
        ) from error


def _join(store: Any, rank: int, world_size: int, limit: timedelta) -> None:
    """Join over a store that all ranks share, on a GPU of this rank's own."""
    store.set_timeout(limit)
    if device.is_gpu() and world_size > 1:
        seat = gpus.own_seat(rank, this_node(), int(os.environ.get("LOCAL_RANK", "0")))
        # DeepSpeed takes the GPU of this number too.
        os.environ["LOCAL_RANK"] = str(gpus.assign(gpus.meet(store, seat, world_size, limit))[rank])
    local = device.activate()
    options: dict[str, Any] = {"timeout": limit}
    if local.type == "cuda":
        options["device_id"] = local
    backend, store = device.communication_backend(), dist.PrefixStore("default_pg", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, **options)


def _give_to_new_groups(limit: timedelta) -> None:
    """Make a time limit that of every process group made from now on without one.

    ``new_group`` takes torch's own default (10 minutes under NCCL, 30 under gloo), not the limit of the first group,
    and neither DeepSpeed nor torch's checkpointing passes one.
    """
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, limit)


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


def gather(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank. Collective."""
    if dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def raise_on_every_rank(error: Exception | None) -> None:
    """Raise on all ranks if one of them brings an error: its own there, a copy elsewhere. Collective.

    An :class:`OSError` (with its errno), a :class:`~rewarm.errors.UserError` and a :class:`~rewarm.errors.NodeFault`
    stay what they are, so that every rank ends alike, whichever ends first; anything else
    becomes a ``RuntimeError`` on the ranks that did not fail.
    """
    if not any_rank(error is not None):
        return
    found = gather(None if error is None else _summary(error))
    if error is not None:
        raise error
    rank, (kind, arguments) = next((rank, entry) for rank, entry in enumerate(found) if entry is not None)
    if kind == "os":
        raise OSError(*arguments)
    if kind == "user":
        raise UserError(arguments[0], fix=arguments[1])
    if kind == "node":
        raise NodeFault(*arguments)
    raise RuntimeError(f"rank {rank}: {arguments[0]}")


def on_every_rank(action: Callable[[], T]) -> T:
    """What the action returns on this rank; what it raises on one rank is raised on all. Collective."""
    error: Exception | None = None
    found: list[T] = []
    try:
        found.append(action())
    except Exception as caught:
        error = caught
    raise_on_every_rank(error)
    return found[0]


def on_main(action: Callable[[], T]) -> T | None:
    """What the action returns on rank 0, None elsewhere; what it raises is raised on every rank. Collective."""
    return on_every_rank(lambda: action() if dist.get_rank() == 0 else None)


def _summary(error: Exception) -> tuple[str, tuple[Any, ...]]:
    if isinstance(error, OSError):
        return "os", (error.errno, error.strerror or str(error), error.filename and str(error.filename))
    if isinstance(error, UserError):
        return "user", (error.message, error.fix)
    if isinstance(error, NodeFault):
        return "node", (error.node, error.message)
    return "other", (f"{type(error).__name__}: {error}",)

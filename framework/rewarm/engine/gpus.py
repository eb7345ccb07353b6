"""Which GPU is whose: the ranks of a node agree before any of them starts NCCL.

Usually every rank sees all GPUs of its node, and the one numbered by its local rank is its own. Under
``srun --gpus-per-task`` each rank sees its own ones only, numbered from 0; under ``--gpu-bind=closest`` ranks see
overlapping sets, in which equal numbers may mean one GPU or two. What a GPU is called by every rank alike is its UUID.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from rewarm.errors import UserError

_FOLDER = "rewarm/gpus"


@dataclass(frozen=True, slots=True)
class Seat:
    """What one rank sees."""

    rank: int
    node: str
    local_rank: int
    gpus: tuple[str, ...]
    """UUIDs, by the number that this rank knows each GPU by; at least one."""


def own_seat(rank: int, node: str, local_rank: int) -> Seat:
    """The seat of this rank, by what torch sees."""
    import torch

    found = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    return Seat(rank, node, local_rank, tuple(found))


def meet(store: Any, seat: Seat, world_size: int, timeout: timedelta) -> list[Seat]:
    """The seats of all ranks of this node. Collective over all ranks of the job.

    Args:
        store: torch's, that all ranks share.
        seat: this rank's.
        world_size: ranks of the job.
        timeout: until a rank that does not come is given up.
    """
    key = f"{_FOLDER}/{seat.node}"
    store.append(key, json.dumps(asdict(seat)) + "\n")
    # Whoever comes last tells the others: no rank reads more than the lines of its own node.
    if store.add(f"{_FOLDER}/met", 1) == world_size:
        store.set(f"{_FOLDER}/all", "1")
    store.wait([f"{_FOLDER}/all"], timeout)
    read = [json.loads(line) for line in store.get(key).decode().splitlines()]
    return [Seat(**{**values, "gpus": tuple(values["gpus"])}) for values in read]


def assign(seats: Sequence[Seat]) -> dict[int, int]:
    """A GPU for each rank, none for two. A pure function, so that all ranks of the node find the same.

    Args:
        seats: of the ranks of one node.

    Returns:
        By rank, the number under which it knows its GPU: that of its local rank wherever that works.

    Raises:
        UserError: if the ranks see fewer GPUs than they are.
    """
    owner: dict[str, Seat] = {}
    for seat in sorted(seats, key=lambda seat: (seat.local_rank, seat.rank)):
        if not _seated(seat, owner, set()):
            every = {gpu for each in seats for gpu in each.gpus}
            raise UserError(
                f"{len(seats)} ranks of this job run on {seat.node}, which shows them {len(every)} "
                f"{'GPU' if len(every) == 1 else 'GPUs'}: rank {seat.rank} would share one with another rank, which "
                "NCCL refuses",
                fix="start as many ranks on a node as it has GPUs (srun --ntasks-per-node, torchrun --nproc-per-node), "
                "and let each see all of them (--gpu-bind=none) or its own (--gpus-per-task=1)",
            )
    return {seat.rank: seat.gpus.index(gpu) for gpu, seat in owner.items()}


def _seated(seat: Seat, owner: dict[str, Seat], tried: set[str]) -> bool:
    """Give a rank a GPU, if need be by moving others (an augmenting path of a bipartite matching)."""
    first = seat.local_rank % len(seat.gpus)
    wanted = [gpu for gpu in (*seat.gpus[first:], *seat.gpus[:first]) if gpu not in tried]
    for gpu in wanted:
        if gpu not in owner:
            owner[gpu] = seat
            return True
    tried.update(wanted)
    for gpu in wanted:
        if _seated(owner[gpu], owner, tried):
            owner[gpu] = seat
            return True
    return False

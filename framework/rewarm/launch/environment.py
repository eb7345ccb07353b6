"""Which ranks this process belongs to, from the variables that launchers set. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from rewarm.errors import UserError


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the ranks of its job."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str
    """torchrun (also rewarm's own local launcher), slurm, or single."""


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Read the launcher's variables.

    Raises:
        UserError: if a launcher set some of its variables but not all, naming what is missing.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in environment]
        if missing:
            raise UserError(
                f"RANK or WORLD_SIZE is set but {', '.join(missing)} is not",
                fix="start the ranks with torchrun or srun, or unset RANK and WORLD_SIZE to let rewarm start them",
            )
        rank, world, local = (int(environment[name]) for name in names[:3])
        return Ranks(rank, world, local, "torchrun")
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return Ranks(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_NTASKS"]),
            int(environment["SLURM_LOCALID"]),
            "slurm",
        )
    return Ranks(0, 1, 0, "single")


def export_slurm_rendezvous(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torch's rendezvous variables from SLURM's, without ssh or a hostfile.

    The port follows from the job and step ids, so that two jobs on a node do not meet.
    """
    ranks = find_ranks(environment)
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(20000 + (job * 17 + step) % 20000))
    environment["RANK"], environment["WORLD_SIZE"] = str(ranks.rank), str(ranks.world_size)
    environment["LOCAL_RANK"] = str(ranks.local_rank)


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list such as ``gpu[003-007,012],login1``."""
    match = re.match(r"^([^,\[]+)(?:\[([^\]]+)\])?([^,\[]*)", nodelist)
    if match is None:
        raise UserError(f"cannot read the SLURM node list {nodelist!r}")
    prefix, inside, suffix = match.groups()
    return prefix + (re.split(r"[,-]", inside)[0] if inside else "") + suffix

"""Which ranks this process belongs to, from the variables that launchers set. No torch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

from rewarm.errors import UserError


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the ranks of its job."""

    rank: int
    world_size: int
    local_rank: int
    launcher: Literal["torchrun", "slurm", "single"]
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
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1"))
    if num_tasks > 1 and "SLURM_PROCID" in environment and _in_step(environment):
        return Ranks(int(environment["SLURM_PROCID"]), num_tasks, int(environment["SLURM_LOCALID"]), "slurm")
    return Ranks(0, 1, 0, "single")


def _in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process: a batch script also has a SLURM_PROCID, but is not one of the tasks."""
    return "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment


def check_not_batch_script(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to train in a batch script itself, where only the first node would work.

    Raises:
        UserError: if the job has several tasks and srun started none of them.
    """
    num_tasks = int(environment.get("SLURM_NTASKS", "1"))
    if num_tasks > 1 and "SLURM_PROCID" in environment and not _in_step(environment) and "RANK" not in environment:
        raise UserError(
            f"this SLURM job has {num_tasks} tasks, but the command runs once, in the batch script",
            fix="write srun before it, or let rewarm submit write the batch script",
        )


def export_slurm_rendezvous(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torch's rendezvous variables from SLURM's, without ssh or a hostfile.

    The port follows from the job, so that two jobs on a node do not meet; a batch script that has found a free one
    exports it as MASTER_PORT and is obeyed.
    """
    ranks = find_ranks(environment)
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _address(first_host(nodes))
    environment.setdefault("MASTER_PORT", str(slurm_port(environment)))
    environment["RANK"], environment["WORLD_SIZE"] = str(ranks.rank), str(ranks.world_size)
    environment["LOCAL_RANK"] = str(ranks.local_rank)


def slurm_port(environment: Mapping[str, str] = os.environ) -> int:
    """A port for the ranks of a job to meet at, below those that systems give to outgoing connections.

    It differs between the steps and the attempts of a job too: what is left of an earlier attempt may still listen.
    """
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_STEP_ID", "0"))
    attempt = int(environment.get("SLURM_RESTART_COUNT", "0"))
    return 15000 + (job * 17 + step * 5 + attempt * 3) % 17000


def this_node(environment: Mapping[str, str] = os.environ) -> str:
    """What SLURM calls this machine, else its host name."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def _address(node: str) -> str:
    """The name of a node if it resolves, else the address under which SLURM itself reaches it."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    try:
        command = ["scontrol", "show", "node", "--oneliner", node]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    for word in shown.split():
        if word.startswith("NodeAddr="):
            return word.removeprefix("NodeAddr=")
    return node


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list such as ``gpu[003-007,012],login1``."""
    match = re.match(r"^([^,\[]+)(?:\[([^\]]+)\])?([^,\[]*)", nodelist)
    if match is None:
        raise UserError(f"cannot read the SLURM node list {nodelist!r}")
    prefix, inside, suffix = match.groups()
    return prefix + (re.split(r"[,-]", inside)[0] if inside else "") + suffix

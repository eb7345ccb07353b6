"""SLURM through its own commands. No torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from rewarm.errors import UserError, nearest

_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition as ``sinfo`` describes it; figures are those of its best-equipped node."""

    name: str
    default: bool
    up: bool
    max_seconds: int | None
    """Longest job; None means no limit."""
    num_nodes: int
    num_usable: int
    """Nodes that are not down, drained or failing."""
    cpus_per_node: int
    gpus_per_node: int


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job that SLURM still knows as waiting or running."""

    id: str
    state: str
    """SLURM's long state, such as PENDING or RUNNING."""
    reason: str
    """Why it waits, or where it runs."""
    seconds: str
    """Time used, as SLURM writes it."""


def run_slurm(*command: str) -> str:
    """Standard output of a SLURM command.

    Raises:
        UserError: with what SLURM had to say if it failed, or if SLURM is not on this host.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"no SLURM on this host: {command[0]} is not on the PATH",
            fix="log in to a node that submits jobs; for a single machine, rewarm train or torchrun is enough",
        )
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {_TIMEOUT:.0f} s", fix="try again later") from None
    if result.returncode:
        said = re.sub(rf"(?m)^{command[0]}: (error: )?", "", result.stderr).strip().replace("\n", "; ")
        raise UserError(f"{command[0]} refused: {said or f'status {result.returncode}'}")
    return result.stdout


def find_partitions() -> dict[str, Partition]:
    """Every partition of the cluster by name.

    Raises:
        UserError: if there is no SLURM here, or it does not answer.
    """
    found: dict[str, Partition] = {}
    for line in run_slurm("sinfo", "--noheader", "--exact", "--format", "%P|%a|%l|%D|%T|%c|%G").splitlines():
        name, up, limit, count, state, cpus, gres = line.split("|")
        default, name, nodes = name.endswith("*"), name.rstrip("*"), int(count)
        usable = nodes if re.match(r"(idle|alloc|mix|comp|resv|plan)", state) and not state.endswith("*") else 0
        before = found.get(name)
        found[name] = Partition(
            name=name,
            default=default,
            up=up == "up",
            max_seconds=None if limit == "infinite" else parse_time(limit),
            num_nodes=nodes + (before.num_nodes if before else 0),
            num_usable=usable + (before.num_usable if before else 0),
            cpus_per_node=max(int(cpus), before.cpus_per_node if before else 0),
            gpus_per_node=max(count_gpus(gres), before.gpus_per_node if before else 0),
        )
    return found


def choose_partition(name: str | None) -> Partition:
    """A partition by name, or the default one.

    Raises:
        UserError: if it does not exist or takes no jobs.
    """
    partitions = find_partitions()
    if name is None:
        default = next((partition for partition in partitions.values() if partition.default), None)
        if default is None:
            raise UserError("this cluster has no default partition", fix=f"--partition: one of {', '.join(partitions)}")
        return default
    if name not in partitions:
        guess = nearest(name, list(partitions))
        known = f"did you mean {guess}?" if guess else f"partitions here: {', '.join(partitions)}"
        raise UserError(f"partition {name!r} does not exist", fix=known)
    if not partitions[name].up:
        raise UserError(f"partition {name!r} is down and takes no jobs", fix="choose another one, see sinfo")
    return partitions[name]


def count_gpus(gres: str) -> int:
    """GPUs in a node's generic resources such as ``gpu:h100:8(S:0-1),nvme:2``."""
    counts = re.findall(r"gpu(?::[A-Za-z][\w.-]*)?:(\d+)", gres)
    return sum(int(count) for count in counts)


_TIME = re.compile(r"^(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?$")


def parse_time(text: str) -> int:
    """Seconds of a SLURM time: ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` or ``D-H:M:S``.

    Raises:
        UserError: if it is none of these, or zero.
    """
    match = _TIME.match(text.strip())
    if match is None:
        raise UserError(
            f"time {text!r} is not one that SLURM knows", fix="write minutes, H:M:S or D-H:M:S, such as 8:00:00"
        )
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"time {text!r} is no time at all", fix="write minutes, H:M:S or D-H:M:S, such as 8:00:00")
    return total


def find_jobs(ids: list[str]) -> list[QueuedJob]:
    """Those of some jobs that wait or run, in the order of their numbers."""
    if not ids or shutil.which("squeue") is None:
        return []
    # One user's queue, and not --jobs: squeue fails as a whole when it has forgotten one of the ids.
    shown = run_slurm("squeue", "--noheader", "--me", "--format", "%A|%T|%R|%M")
    jobs = [QueuedJob(*line.split("|", 3)) for line in shown.splitlines() if line.count("|") >= 3]
    return sorted((job for job in jobs if job.id in ids), key=lambda job: int(job.id))

"""A look at the machines before the first step: seconds now instead of hours of a run that a bad node spoils.

What is wrong with one machine raises :class:`~rewarm.errors.NodeFault` with its name, so that the next attempt can
avoid it; what is only odd becomes a message.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rewarm.engine.base import Engine
from rewarm.engine.environment import this_node
from rewarm.errors import NodeFault, UserError

MIN_FREE_GPU_SHARE = 0.9
"""Of a GPU's memory: less means that another process, or a dead one, holds some of it."""
CHECKPOINT_BYTES_PER_PARAMETER = 16
"""Parameters in fp32, and the optimizer's fp32 copy and two moments: what one checkpoint takes, at most."""
MAX_CLOCK_SKEW = 60.0
"""Seconds a node's clock may be off: beyond it file times, credentials and logs cannot be trusted."""
NOTED_CLOCK_SKEW = 2.0
"""Seconds from which it is mentioned."""
SLOW_FACTOR = 3.0
"""A node is mentioned when its work or memory takes this many times the median."""
_MATRIX = 1024
_REDUCE_BYTES = 1 << 24
_REDUCE_TURNS = 3
_WORK_TURNS = 4


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one rank found on its machine."""

    node: str
    clock: float
    """Unix time, taken right after a barrier."""
    work_seconds: float
    """Time of a matrix product of fixed size."""
    reduce_seconds: float
    """Mean time of an all-reduce of 16 MiB; includes waiting for the slowest."""
    free_disk: int
    """Bytes free where the run folder lies."""


def check_device() -> None:
    """Look at this rank's device before it joins the others.

    Raises:
        NodeFault: if the GPU is missing, does not answer, or is mostly occupied.
        UserError: if this rank was started where no GPU is left for it.
    """
    import torch

    from rewarm.engine import device

    # Read when CUDA starts, which the look at the GPU does: Megatron-Core's overlapped communication relies on it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not device.is_gpu():
        _check_no_gpu_is_meant()
        return
    _check_number(torch.cuda.device_count())
    local = device.local_device().index
    try:
        free, total = torch.cuda.mem_get_info(local)
    except RuntimeError as error:
        raise NodeFault(this_node(), f"GPU {local} does not answer: {str(error).splitlines()[0]}") from error
    # On a machine of one's own a shared GPU may be meant; SLURM gives it to one job.
    if "SLURM_JOB_ID" in os.environ and free < MIN_FREE_GPU_SHARE * total:
        held = (total - free) / 2**30
        raise NodeFault(this_node(), f"GPU {local}: {held:.1f} GiB of {total / 2**30:.1f} are held by other processes")


_VISIBLE = "CUDA_VISIBLE_DEVICES"
_BINDINGS = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND", "SLURM_NTASKS_PER_GPU")
"""What SLURM sets where the ranks of a node may each see other GPUs."""


def _check_no_gpu_is_meant() -> None:
    """Torch finds no GPU: right, unless SLURM gave some.

    Raises:
        NodeFault: if it did.
        UserError: if it gave them to the job, but not to this step.
    """
    import torch

    given, visible = _gpus_of_node(), os.environ.get(_VISIBLE)
    if not given or visible in ("", "-1"):  # these are how people ask for the CPU
        return
    if visible == "NoDevFiles":
        raise UserError(
            f"the job has {given} GPUs on {this_node()}, but SLURM gave this step none ({_VISIBLE}={visible})",
            fix="add --gpus-per-node to srun, or leave out what takes the GPUs away (--gpus=0, --gres=none)",
        )
    why = "this torch is built without CUDA" if torch.version.cuda is None else "see nvidia-smi there"
    raise NodeFault(this_node(), f"SLURM gave {given} GPUs, but torch finds none: {why}")


def _check_number(found: int) -> None:
    """Judge the number of GPUs that this rank sees where it is too low for its local rank.

    That is no fault by itself: under ``srun --gpus-per-task`` or ``--gpu-bind`` each rank sees a part of the node's.

    Raises:
        NodeFault: if some of those that it was given are missing.
        UserError: if more ranks were started than there are GPUs.
    """
    local, visible = int(os.environ.get("LOCAL_RANK", "0")), os.environ.get(_VISIBLE)
    if local < found:
        return
    in_job, of_node = "SLURM_JOB_ID" in os.environ, _gpus_of_node()
    bound = any(os.environ.get(name) for name in _BINDINGS)
    named = None if visible is None else len([name for name in visible.split(",") if name.strip()])
    if named is not None and found < named:
        what = f"{_VISIBLE}={visible} names {named} GPUs, but torch finds {found}"
        if in_job:
            raise NodeFault(this_node(), f"{what}, none for local rank {local}")
        raise UserError(what, fix="name those that nvidia-smi lists")
    if named is None and not bound and found < of_node:
        raise NodeFault(this_node(), f"SLURM gave {of_node} GPUs, but torch finds {found}, none for local rank {local}")
    # What each rank sees may be its own; whether it is, the ranks find out when they meet (engine/gpus.py).
    seen_by_all = named is None or named == of_node or (not in_job and found > 1)
    if seen_by_all and not bound:
        raise UserError(
            f"this is local rank {local} on {this_node()}, where there are only {found} GPUs",
            fix=f"start at most {found} ranks there, or ask for more GPUs",
        )


def _gpus_of_node() -> int:
    """GPUs of this node that SLURM gave the job; 0 if it gave none, or there is no SLURM."""
    text = os.environ.get("SLURM_GPUS_ON_NODE") or os.environ.get("SLURM_GPUS_PER_NODE") or ""
    # SLURM_GPUS_PER_NODE is what was asked for: 8, h100:8 or a100:4,v100:4.
    numbers = [part.rpartition(":")[2] for part in text.split(",")]
    return sum(int(number) for number in numbers if number.isdigit())


def check_nodes(engine: Engine, folder: Path) -> list[str]:
    """Measure every rank's machine and compare. Collective.

    Args:
        engine: after the ranks have met.
        folder: the run folder.

    Returns:
        What is odd, for people to read; the same on every rank.

    Raises:
        NodeFault: on every rank, naming the node that is not fit.
        UserError: on every rank, if the run folder's file system is full.
    """
    engine.barrier()
    clock = time.time()
    report = NodeReport(
        node=this_node(),
        clock=clock,
        work_seconds=_time_work(),
        reduce_seconds=_time_reduce(engine),
        free_disk=shutil.disk_usage(folder).free,
    )
    return compare(engine.gather(report), folder, CHECKPOINT_BYTES_PER_PARAMETER * engine.parameter_count())


def compare(reports: Sequence[NodeReport], folder: Path, checkpoint_bytes: int) -> list[str]:
    """Judge the reports of all ranks.

    Args:
        reports: one of each rank.
        folder: the run.
        checkpoint_bytes: what one checkpoint takes; with less free than that the first save would fail.

    Returns:
        What is odd.

    Raises:
        NodeFault: naming the node that is not fit.
        UserError: if the run folder's file system is full.
    """
    clock = statistics.median(report.clock for report in reports)
    for report in reports:
        skew = report.clock - clock
        if abs(skew) > MAX_CLOCK_SKEW:
            raise NodeFault(report.node, f"its clock is {skew:+.0f} s off that of the others")
        if report.free_disk < checkpoint_bytes:
            free, needed = report.free_disk / 2**20, checkpoint_bytes / 2**20
            # Not the node's fault: most run folders lie on storage that all nodes share.
            raise UserError(
                f"node {report.node} finds only {free:.0f} MiB free where {folder} lies, and one checkpoint takes "
                f"{needed:.0f} MiB",
                fix="free some space, lower checkpoint.keep, or set runs_folder to another file system",
            )
    work = statistics.median(report.work_seconds for report in reports)
    odd: dict[str, None] = {}
    for report in reports:
        skew = report.clock - clock
        if abs(skew) > NOTED_CLOCK_SKEW:
            odd[f"node {report.node}: its clock is {skew:+.1f} s off that of the others"] = None
        if report.work_seconds > SLOW_FACTOR * work:
            odd[f"node {report.node}: computes {report.work_seconds / work:.1f} times slower than the median"] = None
    nodes = len({report.node for report in reports})
    if nodes > 1:
        seconds = max(report.reduce_seconds for report in reports)
        odd[f"{len(reports)} ranks on {nodes} nodes, all-reduce of 16 MiB: {seconds * 1e3:.1f} ms"] = None
    return list(odd)


def _time_work() -> float:
    """Seconds of the fastest of some matrix products, checked against what they must give.

    Raises:
        NodeFault: if a product is wrong.
    """
    import torch

    from rewarm.engine import device

    size = _MATRIX if device.is_gpu() else _MATRIX // 4
    index = torch.arange(size, device=device.local_device(), dtype=torch.float64) / size
    factor = index[:, None].repeat(1, size)
    # Every column of the product is index * sum(index) = index * (size - 1) / 2.
    expected = (index * ((size - 1) / 2))[:, None].expand(size, size)
    best = float("inf")
    for _ in range(_WORK_TURNS):
        device.synchronize()
        started = time.perf_counter()
        product = factor @ factor
        device.synchronize()
        best = min(best, time.perf_counter() - started)
        if not torch.allclose(product, expected, rtol=1e-9):
            raise NodeFault(this_node(), f"{device.local_device()} gets a matrix product wrong")
    return best


def _time_reduce(engine: Engine) -> float:
    """Mean seconds of an all-reduce of 16 MiB over all ranks, after one to warm up. Collective."""
    if engine.world_size == 1:
        return 0.0
    import torch

    from rewarm.engine import device
    from rewarm.engine.ranks import sum_over_ranks

    values = torch.zeros(_REDUCE_BYTES // 4, device=device.local_device())
    sum_over_ranks(values)
    device.synchronize()
    started = time.perf_counter()
    for _ in range(_REDUCE_TURNS):
        sum_over_ranks(values)
    device.synchronize()
    return (time.perf_counter() - started) / _REDUCE_TURNS

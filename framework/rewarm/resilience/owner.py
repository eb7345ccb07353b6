"""Who owns a run folder: how a process describes itself, and how others find out whether it still lives. No torch."""

from __future__ import annotations

import getpass
import os
import subprocess
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rewarm.engine.environment import this_node


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, described so that one on another host can judge it."""

    host: str
    user: str
    pid: int
    started: int
    """Clock ticks from boot to the start of the process: tells it from a later one with the same id."""
    kernel: str
    """Boot and process-id namespace: where ``pid`` means something."""
    since: float
    """Unix time at which it became the owner."""
    cluster: str | None = None
    """SLURM cluster."""
    job: str | None = None
    """SLURM job; None outside SLURM."""
    attempt: int = 0
    """How often SLURM had requeued the job."""

    @staticmethod
    def this_process() -> Owner:
        """The calling process."""
        job = os.environ.get("SLURM_JOB_ID")
        return Owner(
            host=this_node(),
            user=getpass.getuser(),
            pid=os.getpid(),
            started=_start_ticks(os.getpid()) or 0,
            kernel=_kernel(),
            since=time.time(),
            cluster=os.environ.get("SLURM_CLUSTER_NAME") if job else None,
            job=job,
            attempt=int(os.environ.get("SLURM_RESTART_COUNT", "0")) if job else 0,
        )

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Owner:
        """What :meth:`to_dict` returned; unknown keys are left out."""
        return Owner(**{field.name: values[field.name] for field in fields(Owner) if field.name in values})

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        what = f"process {self.pid}" if self.job is None else f"SLURM job {self.job}"
        return f"{what} on {self.host} (user {self.user}, since {time.strftime('%F %T', time.localtime(self.since))})"

    def is_gone_here(self) -> bool:
        """True if it was a process of this kernel and is none any more; False also where this host cannot know."""
        return self.kernel == _kernel() and _start_ticks(self.pid) != self.started

    def is_alive(self) -> bool | None:
        """Whether it still runs; None when this host cannot know."""
        if self.kernel == _kernel():
            return _start_ticks(self.pid) == self.started
        if self.job is not None and self.cluster == cluster_name():
            return _slurm_says(self.job, self.attempt)
        return None


def cluster_name() -> str | None:
    """The SLURM cluster this host belongs to, or None."""
    known = os.environ.get("SLURM_CLUSTER_NAME")
    if known:
        return known
    for line in (_output("scontrol", "show", "config") or "").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "ClusterName":
            return value.strip()
    return None


def _slurm_says(job: str, attempt: int) -> bool | None:
    """Whether an attempt of a job still runs. A job that SLURM has forgotten does not."""
    known = _output("squeue", "--noheader", "--jobs", job, "--format", "%T")
    if known is None:
        # squeue fails on an id that it has never had or has forgotten; and when the controller is away.
        return (
            False
            if _output("squeue", "--noheader", "--format", "%T", "--user", getpass.getuser()) is not None
            else None
        )
    if known.strip() not in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "SIGNALING", "STAGE_OUT"):
        return False
    shown = _output("scontrol", "show", "job", "--oneliner", job) or ""
    restarts = next((word.split("=")[1] for word in shown.split() if word.startswith("Restarts=")), str(attempt))
    return int(restarts) == attempt


def _output(*command: str) -> str | None:
    """Standard output of a command that succeeded, None otherwise."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def _start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if there is none or it is a zombie."""
    try:
        # The name in parentheses may hold spaces: the fields after it are counted.
        rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if rest[0] in "ZX" else int(rest[19])


def _kernel() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"

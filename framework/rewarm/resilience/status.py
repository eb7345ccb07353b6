"""``status.json`` of a run: how its last invocation stands or ended. No torch."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from rewarm.files import parse_json, write_whole

FILE = "status.json"

State = Literal["running", "finished", "paused", "stopped"]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What the main rank last said."""

    state: State
    """running; finished: the stage is at its end; paused: at ``stop_at``; stopped: by a signal, after saving. A run
    that says running and that nobody owns has died."""
    step: int
    """Steps trained when this was written."""
    total_steps: int
    """Steps of the stage."""
    reason: str | None = None
    """What stopped it, such as SIGTERM."""
    attempt: str | None = None
    """``<job>.<restarts>`` under SLURM; None elsewhere."""
    time: float = 0.0
    """Unix time of writing."""


def this_attempt() -> str | None:
    """Which attempt of which SLURM job this process belongs to, None outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return None if job is None else f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def write_status(run: Path, state: State, step: int, total_steps: int, reason: str | None = None) -> None:
    """Replace the status of a run; a reader sees the old one or the new one. Main rank only."""
    status = RunStatus(state, step, total_steps, reason, this_attempt(), time.time())
    write_whole(run / FILE, json.dumps(asdict(status), indent=1))


def read_status(run: Path) -> RunStatus | None:
    """The status of a run; None if it never started, or if the file is damaged: the next start writes it anew."""
    try:
        status = RunStatus(**parse_json((run / FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    numbers = (status.step, status.total_steps, status.time)
    texts = (status.reason, status.attempt)
    whole = (
        status.state in get_args(State)
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        and all(text is None or isinstance(text, str) for text in texts)
    )
    return status if whole else None

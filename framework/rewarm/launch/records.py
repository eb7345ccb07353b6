"""What a run folder remembers of its SLURM jobs: submissions, their jobs, and how each attempt went. No torch.

``<run>/slurm/003/`` is the third submission: the batch script, the resolved configuration, a copy of the code, and
``jobs.json``; ``<run>/slurm/job-17/`` is a job whose batch script a person wrote. ``<run>/slurm/attempts.jsonl`` has a
line when an attempt begins and one when it ends; an attempt without an end was lost with its node.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarm.checkpoint.store import list_checkpoints, step_of
from rewarm.files import parse_json, sync_folder, write_whole

SCRIPT = "job.sbatch"
CONFIG = "config.yaml"
CODE = "code"
ERRORS = "errors"
STOP = "stop-requested"
"""Marker of a submission that ``rewarm cancel`` has stopped."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a job: from its batch script's start to its end."""

    submission: str
    name: str
    """``<job>.<restarts>``."""
    nodes: str
    """SLURM node list."""
    began: float
    """Unix time."""
    first_step: int
    """Step of the newest checkpoint at its start; 0 without one."""
    outcome: str = "lost"
    """finished, paused, stopped, limit, crashed, node, refused or lost."""
    last_step: int | None = None
    """Step of the newest checkpoint at its end; None when it was lost."""
    reason: str | None = None
    """What stopped or broke it."""
    bad_nodes: tuple[str, ...] = ()
    """Nodes it blames."""


def submissions(run: Path) -> list[Path]:
    """Folders of a run's submissions: numbered ones of ``rewarm submit``, then those of batch scripts by hand."""
    return sorted(folder for folder in (run / "slurm").glob("*[0-9]") if folder.is_dir())


def new_submission(run: Path) -> Path:
    """An empty folder for the next submission."""
    past = [int(folder.name) for folder in submissions(run) if folder.name.isdigit()]
    folder = run / "slurm" / f"{max(past, default=0) + 1:03d}"
    folder.mkdir(parents=True)
    for made in (folder.parent, folder.parent.parent):
        sync_folder(made)
    return folder


def write_jobs(submission: Path, ids: list[str]) -> None:
    """Remember the jobs of a submission."""
    write_whole(submission / "jobs.json", json.dumps({"jobs": ids, "time": time.time()}))


def read_jobs(submission: Path) -> list[str]:
    """The jobs of a submission; empty if it was never queued, or if nobody can tell any more."""
    try:
        jobs = parse_json((submission / "jobs.json").read_bytes())["jobs"]
        return [str(job) for job in jobs] if isinstance(jobs, list) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def all_jobs(run: Path) -> list[str]:
    """The jobs of all submissions of a run."""
    return [job for submission in submissions(run) for job in read_jobs(submission)]


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    checkpoints = list_checkpoints(run / "checkpoints")
    return (step_of(checkpoints[0]) or 0) if checkpoints else 0


def record(run: Path, line: dict[str, Any]) -> None:
    """Append to the attempts; one system call a line."""
    path = run / "slurm" / "attempts.jsonl"
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps({**line, "time": time.time()}).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        sync_folder(path.parent)


def attempts(run: Path) -> list[Attempt]:
    """Every attempt of a run, oldest first. A damaged line is left out: its attempt then counts as lost, or not."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    try:
        lines = (run / "slurm" / "attempts.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    for text in lines:
        try:
            _add_line(found, parse_json(text))
        except (ValueError, KeyError, TypeError):
            continue
    return [Attempt(**values) for values in found.values()]


def _add_line(found: dict[tuple[str, str], dict[str, Any]], line: dict[str, Any]) -> None:
    """Take one line of the attempts into account.

    Raises:
        KeyError, TypeError, ValueError: if it is none.
    """
    key = (str(line["submission"]), str(line["attempt"]))
    if line["event"] == "begin":
        began = {"nodes": str(line["nodes"]), "began": float(line["time"]), "first_step": int(line["step"])}
        found[key] = {"submission": key[0], "name": key[1], **began}
    elif key in found:
        reason = None if line["reason"] is None else str(line["reason"])
        found[key] |= {"outcome": str(line["outcome"]), "last_step": int(line["step"]), "reason": reason,
                       "bad_nodes": tuple(str(node) for node in line["bad_nodes"])}  # fmt: skip

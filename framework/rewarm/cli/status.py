"""``rewarm status``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from rewarm.launch.slurm import QueuedJob
    from rewarm.resilience.owner import Owner
    from rewarm.resilience.status import RunStatus


def status(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders; default: all in runs/.")] = None,
) -> None:
    """Say how runs stand: where they train, how far they are, what ended them.

    [bold]Examples[/bold]

        rewarm status

        rewarm status runs/continue
    """
    from rich.console import Console

    from rewarm.errors import UserError

    console = Console(highlight=False, soft_wrap=True)
    if runs:
        for run in runs:
            if not run.is_dir():
                raise UserError(f"there is no run folder {run}", fix="name one, or see them all: rewarm status")
            print_run(console, run)
        return
    found = sorted(path for path in Path("runs").glob("*") if (path / "logs").is_dir())
    if not found:
        raise UserError("no run folders in runs/", fix="name a run folder: rewarm status RUN")
    for run in found:
        print_run(console, run, brief=True)


def print_run(console: Console, run: Path, *, brief: bool = False) -> None:
    """Print one run: a line, or a paragraph with the history of its jobs."""
    from rich.markup import escape

    from rewarm.errors import UserError
    from rewarm.launch.records import all_jobs, attempts, newest_step
    from rewarm.launch.slurm import find_jobs
    from rewarm.resilience.lock import find_owner
    from rewarm.resilience.status import read_status

    owner, said, jobs = find_owner(run), read_status(run), []
    try:
        jobs = find_jobs(all_jobs(run))
    except UserError as error:
        # What the folder says is worth showing while SLURM's controller is away.
        console.print(f"[yellow]{escape(error.message)}[/yellow]")
    state = describe_state(said, owner, jobs)
    console.print(f"[bold]{escape(str(run))}[/bold]  {escape(state)}{_progress(run, said)}")
    if brief:
        return
    if owner is not None:
        console.print(f"  owner       {owner}")
    console.print(f"  checkpoint  step {newest_step(run)}")
    for job in jobs:
        console.print(f"  job {job.id:<7} {job.state.lower()}, {job.seconds}, {job.reason}", markup=False)
    for attempt in attempts(run)[-8:]:
        began = time.strftime("%m-%d %H:%M", time.localtime(attempt.began))
        steps = f"step {attempt.first_step} to {'?' if attempt.last_step is None else attempt.last_step}"
        outcome = attempt.outcome
        if outcome == "lost" and jobs and attempt.name.split(".")[0] in [job.id for job in jobs if owner]:
            outcome = "running"
        reason = (attempt.reason or "").splitlines()
        console.print(
            f"  attempt     {began}  {attempt.name:<9} {steps:<20} {outcome:<9} {reason[0] if reason else ''}",
            markup=False,
        )


def describe_state(said: RunStatus | None, owner: Owner | None, jobs: list[QueuedJob]) -> str:
    """One word, or a few, for how a run stands."""
    if owner is not None:
        return "running" if said is not None and said.state == "running" else "starting"
    if any(job.state in ("RUNNING", "COMPLETING", "CONFIGURING") for job in jobs):
        return "starting or ending"
    if jobs:
        return f"queued ({jobs[0].reason.strip('()')})"
    if said is None:
        return "never trained"
    if said.state == "running":
        return "died; the same command goes on from its newest checkpoint"
    return said.state if said.reason is None else f"{said.state} ({said.reason})"


def _progress(run: Path, said: RunStatus | None) -> str:
    """Step, loss, speed and time to go, from the newest metrics line."""
    from rewarm.tracking.metrics import read_lines

    path = run / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    if not lines or said is None:
        return ""
    try:
        return _told(lines[-1], said)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # a damaged line hides nothing else of the run
        return ""


def _told(last: dict[str, Any], said: RunStatus) -> str:
    text = f"  step {last['step']}/{said.total_steps}"
    if last["loss"] is not None:
        text += f"  loss {last['loss']:.4f}"
    speed = last["tokens_per_second"]
    if speed and last["step"]:
        left = (said.total_steps - last["step"]) * last["tokens"] / last["step"] / speed
        text += f"  {speed:,.0f} tokens/s" + (f"  {_hours(left)} to go" if left else "")
    return text


def _hours(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"

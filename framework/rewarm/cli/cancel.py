"""``rewarm cancel``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def cancel(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    now: Annotated[
        bool, typer.Option("--now", help="End the job at once; trains again from the last checkpoint.")
    ] = False,
) -> None:
    """Stop the SLURM jobs of a run: those that wait leave the queue, the one that trains saves and stops.

    [bold]Examples[/bold]

        rewarm cancel runs/continue
    """
    from rewarm.errors import UserError
    from rewarm.launch.records import STOP, all_jobs, newest_step, read_jobs, submissions
    from rewarm.launch.slurm import find_jobs, run_slurm

    if not run.is_dir():
        raise UserError(f"there is no run folder {run}")
    jobs = find_jobs(all_jobs(run))
    if not jobs:
        raise UserError(f"{run} has no SLURM job that waits or runs", fix=f"rewarm status {run}")
    # First the mark, so that a job that ends in this moment is not queued again.
    for submission in submissions(run):
        if {job.id for job in jobs} & set(read_jobs(submission)):
            (submission / STOP).touch()
    training = [job.id for job in jobs if job.state == "RUNNING" and not now]
    others = [job.id for job in jobs if job.id not in training]
    if others:
        run_slurm("scancel", *others)
        typer.echo(f"out of the queue: {', '.join(others)}")
    for job in training:
        run_slurm("scancel", "--signal=USR2", job)
        typer.echo(
            f"job {job} saves and stops (last checkpoint so far: step {newest_step(run)}); watch: rewarm status {run}"
        )

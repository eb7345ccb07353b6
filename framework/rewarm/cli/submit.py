"""``rewarm submit``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from rewarm.cli.train import CONFIG_HELP, OVERRIDES_HELP
from rewarm.errors import UserError


def submit(
    config: Annotated[Path, typer.Argument(help=CONFIG_HELP)],
    overrides: Annotated[list[str] | None, typer.Argument(help=OVERRIDES_HELP)] = None,
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a job.")],
    time: Annotated[str, typer.Option(help="Time limit of a job: minutes, HH:MM:SS or D-HH:MM:SS.")],
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node; one rank each.")] = 0,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks of each node, on CPUs.")] = None,
    cpus_per_rank: Annotated[int | None, typer.Option(min=1, help="CPU cores of each rank.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition; default: the cluster's.")] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.")] = None,
    container: Annotated[
        str | None, typer.Option(help="Image to run in: an Apptainer .sif, or any that Enroot's Pyxis takes.")
    ] = None,
    chain: Annotated[int | None, typer.Option(min=1, help="Queue this many jobs, each going on from the last.")] = None,
    until_done: Annotated[
        bool, typer.Option("--until-done", help="Queue the job again at each time limit, until the stage is done.")
    ] = False,
    warning: Annotated[int, typer.Option(min=1, help="Seconds before the limit to save and stop at.")] = 120,
    exclude: Annotated[str | None, typer.Option(help="Nodes to avoid, as a SLURM node list.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Any further sbatch option, such as qos=high.")] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Description of the nodes, as in configs/clusters: plans the memory of a GPU.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, write the batch script, queue nothing.")] = False,
) -> None:
    """Queue a stage on a SLURM cluster.

    Everything that can be checked here is checked before anything is queued. The batch script, the resolved
    configuration and a copy of the code are kept in the run folder.

    [bold]Examples[/bold]

        rewarm submit my.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --until-done

        rewarm submit my.yaml --nodes 2 --ranks-per-node 4 --time 30 --chain 3 --dry-run
    """
    from rewarm.config.load import load
    from rewarm.launch.batch_script import JobRequest
    from rewarm.launch.submit import check_submission, follow_up, queue, write_submission
    from rewarm.planner.cluster import load_cluster

    if ranks_per_node is not None and gpus_per_node and ranks_per_node != gpus_per_node:
        raise UserError(
            f"--ranks-per-node {ranks_per_node} with --gpus-per-node {gpus_per_node}: one rank drives one GPU"
        )
    if not (ranks_per_node or gpus_per_node):
        raise UserError("neither --gpus-per-node nor --ranks-per-node is given", fix="say how many ranks a node runs")
    if chain is not None and until_done:
        raise UserError("--chain and --until-done are two ways to the same end", fix="give one of them")
    again: Literal["no", "requeue", "chain"] = "requeue" if until_done else "chain" if (chain or 1) > 1 else "no"
    settings = load(config, overrides or [])
    request = JobRequest(
        nodes, ranks_per_node or gpus_per_node, gpus_per_node, time, partition, account, container, cpus_per_rank,
        warning, exclude, tuple(text.lstrip("-") for text in option or []), again,
    )  # fmt: skip
    nodes_of = load_cluster(cluster) if cluster is not None else None
    for message in check_submission(settings, request, nodes_of):
        typer.echo(f"note     {message}")
    submission = write_submission(settings, request)
    if dry_run:
        typer.echo(f"checked  nothing is queued; to do so: {shlex.join(['sbatch', str(submission / 'job.sbatch')])}")
        return
    typer.echo(follow_up(settings, request, submission, queue(settings, submission, chain or 1)))

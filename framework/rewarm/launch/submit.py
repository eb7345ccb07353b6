"""From a configuration to queued jobs: check all that can be checked here, write, queue. No torch."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import rewarm
from rewarm.config.load import dump
from rewarm.config.run import RunConfig
from rewarm.engine.layout import check_layout
from rewarm.errors import UserError
from rewarm.files import write_whole
from rewarm.launch.batch_script import JobRequest, Places, batch_script, check_printable, is_apptainer, job_name
from rewarm.launch.records import CODE, CONFIG, SCRIPT, all_jobs, new_submission, write_jobs
from rewarm.launch.slurm import Partition, choose_partition, find_jobs, parse_time, run_slurm
from rewarm.mixing.mixers.build import with_targets
from rewarm.model.architecture import Architecture
from rewarm.model.description import ModelDescription
from rewarm.planner.cluster import Cluster
from rewarm.planner.memory import check_memory
from rewarm.planner.zero import check_state
from rewarm.resilience.lock import find_owner, owned


def check_submission(config: RunConfig, request: JobRequest, cluster: Cluster | None = None) -> list[str]:
    """Check on the login node what would otherwise fail after hours in the queue.

    Args:
        config: the stage.
        request: the job.
        cluster: the nodes it is for, whose memory the plan must fit in; None leaves memory out.

    Returns:
        What the user should know, though it forbids nothing.

    Raises:
        UserError: for the first thing that cannot work.
    """
    check_printable(request, _places(config, request, config.folder.resolve()))
    partition = choose_partition(request.partition)
    messages = check_request(request, partition)
    if request.container is not None:
        _check_container(request.container)
    from rewarm.train.folder import check_same_stage, prepare_folder
    from rewarm.train.stage import resolve_stage

    config = config.model_copy(update={"mixture": with_targets(config.mixture, list(config.data))})
    stage = resolve_stage(config, request.num_ranks)
    config = stage.config
    if cluster is not None:
        messages += check_cluster(config, stage.architecture, request, cluster)
    folder = config.folder
    owner = find_owner(folder)
    if owner is not None:
        raise owned(folder, owner)
    queued = find_jobs(all_jobs(folder))
    if queued:
        raise UserError(
            f"{folder} already has SLURM job {queued[0].id} ({queued[0].state.lower()})",
            fix=f"wait for it, or take it out of the queue: rewarm cancel {folder}; or give this run another name",
        )
    if (folder / "checkpoints" / "latest").exists():
        messages += [f"resumes {folder}", *check_same_stage(config, folder)]
    prepare_folder(folder)
    return messages + stage.messages


def check_request(request: JobRequest, partition: Partition) -> list[str]:
    """Compare what is asked for with what a partition has.

    Returns:
        What the user should know.

    Raises:
        UserError: if the partition can never serve it.
    """
    seconds = parse_time(request.time)
    if partition.max_seconds is not None and seconds > partition.max_seconds:
        raise UserError(
            f"--time {request.time} is above the {partition.max_seconds // 60} minutes of partition {partition.name!r}",
            fix="a shorter time with --until-done or --chain, or another partition",
        )
    if request.warning >= seconds:
        raise UserError(
            f"--warning {request.warning} s leaves nothing of --time {request.time}",
            fix="warn as long ahead of the limit as a step and a checkpoint take, and give more time",
        )
    if request.nodes > partition.num_nodes:
        raise UserError(
            f"--nodes {request.nodes} is more than the {partition.num_nodes} nodes of partition {partition.name!r}",
            fix=f"at most {partition.num_nodes}, or another partition",
        )
    if request.gpus_per_node > partition.gpus_per_node:
        has = f"{partition.gpus_per_node} GPUs a node" if partition.gpus_per_node else "no GPUs"
        raise UserError(
            f"--gpus-per-node {request.gpus_per_node}, but partition {partition.name!r} has {has}",
            fix="fewer, or another partition; --ranks-per-node trains on CPUs",
        )
    cpus = request.ranks_per_node * (request.cpus_per_rank or 1)
    if cpus > partition.cpus_per_node:
        raise UserError(
            f"{request.ranks_per_node} ranks a node with {request.cpus_per_rank or 1} CPUs each need {cpus} CPUs, "
            f"but the nodes of partition {partition.name!r} have {partition.cpus_per_node}",
            fix="fewer ranks, or fewer --cpus-per-rank",
        )
    if request.nodes > partition.num_usable:
        return [f"only {partition.num_usable} nodes of {partition.name!r} are up now: the job will wait for more"]
    return []


def check_cluster(config: RunConfig, model: ModelDescription, request: JobRequest, cluster: Cluster) -> list[str]:
    """Compare what is asked for with the description of a cluster.

    Returns:
        What the user should know: the planned memory.

    Raises:
        UserError: if the nodes or their memory do not suffice.
    """
    if cluster.nodes is not None and request.nodes > cluster.nodes:
        raise UserError(
            f"--nodes {request.nodes} is more than the {cluster.nodes} nodes of {cluster.name}",
            fix=f"at most {cluster.nodes}, or the description of another cluster",
        )
    if request.gpus_per_node > cluster.gpus_per_node:
        raise UserError(
            f"--gpus-per-node {request.gpus_per_node} is more than the {cluster.gpus_per_node} of {cluster.name}",
            fix=f"at most {cluster.gpus_per_node}, or the description of another cluster",
        )
    if not request.gpus_per_node:
        raise UserError(
            f"--cluster {cluster.name} plans the memory of GPUs, but this job has none",
            fix="give --gpus-per-node, or leave out --cluster",
        )
    layout = check_layout(config, model, request.num_ranks)
    if isinstance(model, Architecture):
        return [check_memory(config, model, layout, cluster)]
    return [check_state(config, model, layout, cluster)]


def _check_container(container: str) -> None:
    if container.endswith((".sif", ".sqsh")) and not Path(container).is_file():
        raise UserError(f"there is no container image {container}", fix="check the path; compute nodes must see it too")
    if not is_apptainer(container) and "--container-image" not in run_slurm("srun", "--help"):
        raise UserError(
            f"container {container!r} needs Enroot's Pyxis plugin, which srun does not have here",
            fix="give an Apptainer image (.sif) instead, or ask for Pyxis",
        )


def write_submission(config: RunConfig, request: JobRequest) -> Path:
    """Write the batch script, the resolved configuration and a copy of the code into the run folder.

    Returns:
        The folder of the submission, ``<run>/slurm/<number>``.
    """
    folder = new_submission(config.folder.resolve())
    write_whole(folder / CONFIG, dump(config))
    package = Path(rewarm.__file__).parent
    shutil.copytree(package, folder / CODE / "rewarm", ignore=shutil.ignore_patterns("__pycache__"))
    container = request.container
    if container is not None and Path(container).exists():
        request = replace(request, container=str(Path(container).resolve()))
    places = _places(config, request, folder)
    script = folder / SCRIPT
    write_whole(script, batch_script(request, places))
    script.chmod(0o755)
    return folder


def _places(config: RunConfig, request: JobRequest, submission: Path) -> Places:
    return Places(
        run=config.folder.resolve(),
        submission=submission,
        working_directory=Path.cwd(),
        # Not resolved: the link is what makes it the interpreter of a virtual environment.
        python=Path(sys.executable),
        mounts=_mounts(config) if request.container else (),
        trusts_code=config.deepspeed.trust_remote_code,
    )


def _mounts(config: RunConfig) -> tuple[Path, ...]:
    """Folders that the job reads and writes; those inside another one are left out."""
    named = [config.runs_folder, config.parent, config.tokenizer, *config.replay.paths.values()]
    for domain in config.data.values():
        named += [domain.path, domain.held_out]
    paths = {Path.cwd()}
    for name in filter(None, named):
        path = Path(name).resolve()
        # A bare token file is named by its prefix, and a path that is not there by itself may be one.
        paths.add(path if path.is_dir() else path.parent)
    return tuple(sorted(path for path in paths if not any(other in path.parents for other in paths)))


def queue(config: RunConfig, submission: Path, chain: int) -> list[str]:
    """Queue a written submission.

    Args:
        config: the stage.
        submission: from :func:`write_submission`.
        chain: number of jobs; above 1 they run one after the other.

    Returns:
        Their ids.

    Raises:
        UserError: if SLURM refuses; nothing is left in the queue then.
    """
    script = str(submission / SCRIPT)
    run_slurm("sbatch", "--test-only", script)
    ids: list[str] = []
    try:
        for _ in range(chain):
            ids.append(run_slurm("sbatch", "--parsable", script).strip().split(";")[0])
            write_jobs(submission, ids)
    except UserError:
        if ids:
            run_slurm("scancel", *ids)
        raise
    return ids


def follow_up(config: RunConfig, request: JobRequest, submission: Path, ids: list[str]) -> str:
    """What the user can do next, as text."""
    run = config.folder
    jobs = f"job {ids[0]}" if len(ids) == 1 else f"jobs {ids[0]} to {ids[-1]}, one after the other"
    shape = f"{request.nodes} nodes x {request.ranks_per_node} ranks"
    ends = {
        "no": f"after {request.time} it saves and stops; the same command goes on",
        "requeue": f"after {request.time} it saves and queues itself again, until the stage is done",
        "chain": f"after {request.time} each saves and stops, and the next goes on",
    }[request.again]
    lines = [
        f"queued   {jobs} ({job_name(run)}), {shape}",
        f"         {ends}",
        f"script   {os.path.relpath(submission / SCRIPT)}",
        f"status   {shlex.join(['rewarm', 'status', str(run)])}",
        f"follow   {shlex.join(['rewarm', 'logs', str(run), '--follow'])}",
        f"stop     {shlex.join(['rewarm', 'cancel', str(run)])}      (saves first)",
    ]
    return "\n".join(lines)

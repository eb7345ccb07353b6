"""The text of a batch script. No torch."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rewarm.errors import UserError


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What is asked of SLURM for a run."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    """0 on a cluster without GPUs."""
    time: str
    """Limit of one job, in any of SLURM's formats."""
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    """An Apptainer .sif, or any image that Enroot's Pyxis plugin takes."""
    cpus_per_rank: int | None = None
    warning: int = 120
    """Seconds before the limit at which the ranks are told to save and stop."""
    exclude: str | None = None
    """Node list to avoid."""
    options: tuple[str, ...] = ()
    """More sbatch options, without the leading dashes."""
    again: Literal["no", "requeue", "chain"] = "no"
    """What happens at the time limit: the run stops, the job is requeued, or the next job of a chain goes on."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, slots=True)
class Places:
    """Absolute paths that a job needs."""

    run: Path
    submission: Path
    working_directory: Path
    python: Path
    """Interpreter, where there is no container."""
    mounts: tuple[Path, ...] = ()
    """What a container must see."""
    trusts_code: bool = False
    """Whether the one who submits trusts the model's Python files, which only a command line can say."""


def job_name(run: Path) -> str:
    """The name of a run's jobs; jobs of one name and user never run at once under ``--dependency=singleton``."""
    return f"rewarm-{run.name}"


def check_printable(request: JobRequest, places: Places) -> None:
    """Refuse what no batch script can hold, whatever the quotes: sbatch reads its options line by line.

    Raises:
        UserError: naming the value.
    """
    named = {
        "the working directory": places.working_directory, "the run folder": places.run,
        "the Python interpreter": places.python, "--partition": request.partition, "--account": request.account,
        "--container": request.container, "--exclude": request.exclude,
        **{f"--option {index}": option for index, option in enumerate(request.options, 1)},
        **{f"the path {path}": path for path in places.mounts},
    }  # fmt: skip
    for what, value in named.items():
        if not str(value).isprintable():
            raise UserError(
                f"{what.encode('unicode_escape').decode()} holds a line break or another character that cannot be "
                f"printed: {str(value)!a}",
                fix="rename it, or submit from another folder",
            )
    for sign, why in ((":", "separates the folders of PYTHONPATH"), ("\\", "changes what sbatch's --output means")):
        if sign in str(places.run):
            raise UserError(f"the run folder {places.run} holds {sign!r}, which {why}", fix="set another runs_folder")
    for path in places.mounts:
        if {":", ","} & set(str(path)):
            raise UserError(f"{path} holds ':' or ',', which separate what a container sees", fix="rename it")


def batch_script(request: JobRequest, places: Places) -> str:
    """The whole script.

    Raises:
        UserError: as :func:`check_printable`.
    """
    check_printable(request, places)
    code = places.submission / "code"
    config = places.submission / "config.yaml"
    trust = " deepspeed.trust_remote_code=true" if places.trusts_code else ""
    lines = ["#!/bin/bash", f"# {places.run.name}: written by rewarm submit; runs again as it is with sbatch."]
    lines += [f"#SBATCH --{_sbatch_quoted(option)}" for option in _options(request, places)]
    lines += [
        "",
        f"run={shlex.quote(str(places.run))}",
        f"submission={places.submission.name}",
        f"again={request.again}",
        "",
        "# The code as it was when this was submitted.",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
        "",
        *_commands(request, places),
        f"train=({_python(request, places)} -m rewarm train {shlex.quote(str(config))}{trust})",
        "",
        f"source {shlex.quote(str(code / 'rewarm/launch/job.sh'))}",
    ]
    return "\n".join(lines) + "\n"


def _options(request: JobRequest, places: Places) -> list[str]:
    options = [
        f"job-name={job_name(places.run)}",
        f"nodes={request.nodes}",
        f"ntasks-per-node={request.ranks_per_node}",
    ]
    if request.gpus_per_node:
        options.append(f"gpus-per-node={request.gpus_per_node}")
    if request.cpus_per_rank:
        options.append(f"cpus-per-task={request.cpus_per_rank}")
    options.append(f"time={request.time}")
    for name in ("partition", "account", "exclude"):
        value = getattr(request, name)
        if value:
            options.append(f"{name}={value}")
    options += [
        f"chdir={places.working_directory}",
        f"output={_escaped(places.run)}/logs/slurm.out",
        "open-mode=append",
        f"signal=USR2@{request.warning}",
        "requeue",
    ]
    if request.again == "chain":
        options.append("dependency=singleton")
    return options + list(request.options)


def _sbatch_quoted(option: str) -> str:
    """An option for a ``#SBATCH`` line, where a backslash escapes inside either kind of quotes, unlike in a shell."""
    if not set(" \"'\\#") & set(option):
        return option
    escaped = option.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _escaped(path: Path) -> str:
    """A path in a file-name pattern, where % begins a replacement."""
    return str(path).replace("%", "%%")


def _commands(request: JobRequest, places: Places) -> list[str]:
    """The arrays ``python`` and ``launch``."""
    srun = "srun --kill-on-bad-exit=1"
    if request.container is None:
        return [f"python=({shlex.quote(str(places.python))})", f"launch=({srun})"]
    mounts = ",".join(f"{path}:{path}" for path in places.mounts)
    if is_apptainer(request.container):
        nv = " --nv" if request.gpus_per_node else ""
        inside = (
            f"apptainer exec{nv} --bind {shlex.quote(mounts)} --pwd {shlex.quote(str(places.working_directory))} "
            f"{shlex.quote(request.container)}"
        )
        return [f"container=({inside})", 'python=("${container[@]}" python3)', f'launch=({srun} "${{container[@]}}")']
    inside = (
        f"--container-image={shlex.quote(request.container)} --container-mounts={shlex.quote(mounts)} "
        f"--container-workdir={shlex.quote(str(places.working_directory))} --container-name={job_name(places.run)}"
    )
    return [
        f"container=({inside})",
        f'python=({srun} --nodes=1 --ntasks=1 --overlap "${{container[@]}}" python3)',
        f'launch=({srun} "${{container[@]}}")',
    ]


def is_apptainer(container: str) -> bool:
    """Whether an image is run by Apptainer; everything else goes to Enroot through Pyxis."""
    return container.endswith(".sif") or container.startswith(("oras://", "library://"))


def _python(request: JobRequest, places: Places) -> str:
    return "python3" if request.container else shlex.quote(str(places.python))

"""From a checked configuration to running ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import assert_never

from rewarm.config.run import RunConfig
from rewarm.engine.environment import check_not_batch_script, export_slurm_rendezvous, find_ranks
from rewarm.engine.threads import LoadWatch
from rewarm.launch.local import ERROR_FOLDER, launch_local
from rewarm.launch.terminal import keep_going_without_terminal


def start(config: RunConfig, arguments: list[str]) -> None:
    """Train in this process if it is one of the ranks or the only one; otherwise start the ranks and wait.

    What can be checked without ranks is checked first, so that a mistake costs no start-up of many processes.

    Args:
        config: the stage.
        arguments: the command line that starts a rank of it, after ``rewarm``.
    """
    watch = LoadWatch()
    keep_going_without_terminal()
    check_not_batch_script()
    ranks = find_ranks()
    if ranks.launcher == "slurm":
        export_slurm_rendezvous()
        _split_output(config.folder / "logs", ranks.rank)
        _train(config)
    elif ranks.launcher == "torchrun":
        _train(config)
    elif ranks.launcher == "single":
        _start_here(config, arguments, watch)
    else:
        assert_never(ranks.launcher)


def _start_here(config: RunConfig, arguments: list[str], watch: LoadWatch) -> None:
    """Train with ranks of this machine: in this process if one is enough, else in processes of their own."""
    num_ranks = local_rank_count(config)
    if num_ranks == 1:
        _train(config, watch)
        return
    from rewarm.engine.build import prepare_engine
    from rewarm.mixing.mixers.build import with_targets
    from rewarm.train.folder import check_start, missing_folders, prepare_folder, remove_empty
    from rewarm.train.stage import resolve_stage

    resolved = config.model_copy(update={"mixture": with_targets(config.mixture, list(config.data))})
    check_start(resolve_stage(resolved, num_ranks).config)
    prepare_engine(config)
    made, logs = missing_folders(config.folder), config.folder / "logs"
    prepare_folder(config.folder)
    before = set(logs.iterdir())
    stop_seconds = 60.0 * config.distributed.stop_timeout
    status = launch_local(arguments, num_ranks, logs, watch.busy(), stop_seconds)
    if status:
        # Of ranks that were refused, or that had nothing to say.
        for path in set(logs.glob("rank-*.out")) - before:
            if path.stat().st_size == 0:
                path.unlink()
        remove_empty(made)
    sys.exit(status)


def dry_run(config: RunConfig) -> list[str]:
    """What :func:`start` would do, in lines; nothing is written and no rank is started. Empty on other ranks than 0.

    Raises:
        UserError: for what training would refuse.
    """
    from rewarm.train.dry_run import dry_run as describe

    ranks = find_ranks()
    if ranks.rank:
        return []
    return describe(config, local_rank_count(config) if ranks.launcher == "single" else ranks.world_size)


def local_rank_count(config: RunConfig) -> int:
    """Ranks to start on this machine when no launcher did."""
    if config.parallel.data != "auto":
        return config.parallel.model_ranks * config.parallel.data
    import shutil

    if shutil.which("nvidia-smi") is None:
        return config.parallel.model_ranks
    import torch

    devices = torch.cuda.device_count()
    return max(1, devices // config.parallel.model_ranks) * config.parallel.model_ranks


def _split_output(logs: Path, rank: int) -> None:
    """Give each rank above 0 a file of its own, as the local launcher does, where a batch script waits for the ranks'
    last words; without one they stay on srun's output, where they are seen."""
    if rank == 0 or ERROR_FOLDER not in os.environ:
        return
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / f"rank-{rank}.out", "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _train(config: RunConfig, watch: LoadWatch | None = None) -> None:
    from rewarm.train.session import run_session

    run_session(config, watch)

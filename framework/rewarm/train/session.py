"""One invocation of a stage on one rank: assemble, restore, train, report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rewarm.checkpoint.distributed import find_checkpoint, find_damage, read_state
from rewarm.config.run import RunConfig
from rewarm.engine.base import Engine
from rewarm.engine.threads import LoadWatch, set_threads
from rewarm.errors import UserError
from rewarm.mixing.mixers.build import with_targets
from rewarm.mixing.weight_log import WeightEntry, WeightLog
from rewarm.resilience.health import check_device, check_nodes
from rewarm.resilience.lock import RunLock
from rewarm.resilience.status import State, write_status
from rewarm.schedule.learning_rate import LearningRate
from rewarm.tracking.tracker import Tracker
from rewarm.train.feed import Feed
from rewarm.train.folder import check_same_stage, open_logs, prepare_folder, write_run_files
from rewarm.train.hooks import standard_hooks
from rewarm.train.loop import train
from rewarm.train.run import Run
from rewarm.train.stage import Stage, resolve_stage
from rewarm.train.state import MODEL, restore
from rewarm.train.summary import print_summary

log = logging.getLogger(__name__)


def run_session(config: RunConfig, watch: LoadWatch | None = None) -> None:
    """Train a stage to its end, or to a stop, on the ranks of this job.

    Args:
        config: the stage.
        watch: has seen for a while what other programs do on this machine, where this process is the only rank.

    Raises:
        UserError: for everything that the user can mend; nothing that was saved before is lost.
    """
    from rewarm.engine.build import build_engine
    from rewarm.engine.environment import find_ranks

    ranks = find_ranks()
    check_device()
    config = config.model_copy(update={"mixture": with_targets(config.mixture, list(config.data))})
    stage = resolve_stage(config, ranks.world_size)
    config = stage.config
    lock = RunLock(prepare_folder(config)) if ranks.rank == 0 else None
    try:
        engine = build_engine(config, stage.architecture, stage.names)
        try:
            engine.barrier()
            open_logs(stage.folder, engine.rank)
            _train(config, stage, engine, watch)
        except BaseException:
            # The process group is left as it is: leaving it could wait for ranks that are inside a collective.
            log.exception("rank %d failed", engine.rank)
            raise
        engine.close()
    finally:
        if lock is not None:
            lock.release()


def _train(config: RunConfig, stage: Stage, engine: Engine, watch: LoadWatch | None) -> None:
    """Everything between joining the other ranks and leaving them."""
    messages = check_nodes(engine, stage.folder)
    run = assemble(config, stage, engine)
    busy = None if watch is None else watch.busy()
    run.threads, threads = set_threads(config, stage.architecture, engine, run.threads or None, busy)
    for message in [*messages, *([threads] if threads else [])]:
        run.tracker.message(message)
    if engine.is_main:
        write_status(stage.folder, "running", run.step, config.total_steps)
    try:
        train(run, standard_hooks())
    except BaseException:
        run.tracker.close(1)
        raise
    run.feed.close()
    if engine.is_main:
        write_status(stage.folder, end_state(run), run.step, config.total_steps, run.stop_reason)
    run.tracker.close(0, hurried=run.stop_reason is not None)
    if engine.is_main:
        print_summary(run)


def end_state(run: Run) -> State:
    """How an invocation ended that did not fail. On the main rank.

    A stop during the last evaluation leaves that to a resume: the run is not finished.
    """
    if run.tracker.last_evaluated_step == run.config.total_steps:
        return "finished"
    return "paused" if run.stop_reason is None else "stopped"


def assemble(config: RunConfig, stage: Stage, engine: Engine) -> Run:
    """A run on its ranks, restored from its own newest checkpoint, else started from its parent. Collective."""
    messages: list[str] = []
    checkpoint = find_checkpoint(engine, stage.folder / "checkpoints", messages.append)
    state = None if checkpoint is None else read_state(checkpoint)
    if engine.is_main:
        if state is not None:
            messages += check_same_stage(config, stage.folder)
        write_run_files(config, stage, started=state is not None)
    engine.barrier()
    entries = engine.broadcast(_weight_log(stage, started=state is not None) if engine.is_main else None)
    drawn = None if state is None else state["sampler"]
    sampler = stage.sampler(drawn, entries)
    tracker = Tracker(
        stage.folder,
        config.tracking,
        [domain.name for domain in stage.evaluated],
        config.total_steps,
        resumed_step=int(state["step"]) if state is not None else 0,
        config_dump=config.model_dump(mode="json"),
        is_main=engine.is_main,
    )
    feed = Feed(
        sampler,
        stage.trained,
        global_batch_size=config.batch.global_batch_size,
        total_samples=config.total_steps * config.batch.global_batch_size,
        rank=engine.data_parallel_rank,
        num_ranks=engine.data_parallel_size,
        vocab_size=stage.architecture.vocab_size,
        objective=stage.objective(drawn, entries),
        conditioning=stage.conditioning(),
    )
    schedule = LearningRate(config.schedule, config.total_tokens, config.tokens_per_step)
    run = Run(config, stage, engine, feed, schedule, tracker)
    for message in messages + stage.messages:
        tracker.message(message)
    _fill(run, checkpoint, state)
    return run


def _weight_log(stage: Stage, *, started: bool) -> list[WeightEntry]:
    """The entries of the run's weight log, which a new run begins with the weights of its first sample."""
    weight_log = WeightLog(stage.folder / "mixture.jsonl")
    if not started:
        for entry in stage.planned:
            weight_log.append(entry.sample, entry.weights, entry.reason, entry.objective)
    return weight_log.entries()


def _fill(run: Run, checkpoint: Path | None, state: dict[str, Any] | None) -> None:
    """Give the model its weights: the run's own, the parent's, or random ones."""
    parent = run.stage.origin.parent
    if checkpoint is not None and state is not None:
        restore(run, checkpoint, state)
        run.tracker.message(f"resumed from {checkpoint}")
    elif parent is None:
        run.tracker.message(f"random weights, {run.engine.parameter_count():,} parameters")
    elif parent.checkpoint is not None:
        damage = find_damage(run.engine, parent.checkpoint)
        if damage is not None:
            raise UserError(
                f"parent={parent.checkpoint} is damaged: {damage}", fix="name another checkpoint of the run as parent"
            )
        run.engine.load(parent.checkpoint / MODEL, optimizer=run.config.optimizer_state == "keep")
        run.tracker.message(f"weights of {parent.checkpoint}, optimizer state {run.config.optimizer_state}")
    else:
        run.engine.import_huggingface(parent.folder)
        run.tracker.message(f"weights of {parent.folder}")

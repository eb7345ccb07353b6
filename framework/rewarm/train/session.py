"""One invocation of a stage on one rank: check, restore, train, report.

Everything that can refuse comes first and writes nothing; what is written begins with :func:`begin`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rewarm.checkpoint.distributed import find_checkpoint, find_damage
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
from rewarm.tracking.tracker import Tracker, check_trackers
from rewarm.train.feed import Feed
from rewarm.train.folder import RunFolder, check_same_stage, check_start, write_run_files
from rewarm.train.hooks.base import Hook
from rewarm.train.hooks.build import build_hooks, check_saved_hooks, set_up_hooks
from rewarm.train.imported import check_import, notes_on
from rewarm.train.loop import train
from rewarm.train.run import Run
from rewarm.train.stage import Stage, resolve_stage
from rewarm.train.state import MODEL, WEIGHT_LOG, Position, check_weight_log, read_run_state, restore
from rewarm.train.summary import print_summary

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A session that nothing refuses any more, before it writes anything."""

    config: RunConfig
    stage: Stage
    engine: Engine
    feed: Feed
    position: Position
    hooks: list[Hook]
    started: bool
    """True if the run goes on from a checkpoint of its own."""
    messages: list[str]


def run_session(config: RunConfig, watch: LoadWatch | None = None) -> None:
    """Train a stage to its end, or to a stop, on the ranks of this job.

    Args:
        config: the stage.
        watch: has seen for a while what other programs do on this machine, where this process is the only rank.

    Raises:
        UserError: for everything that the user can mend; nothing that was saved before is lost, and a refusal leaves
            the run folder as it was.
    """
    from rewarm.engine.build import build_engine
    from rewarm.engine.environment import find_ranks

    ranks = find_ranks()
    check_device()
    config = config.model_copy(update={"mixture": with_targets(config.mixture, list(config.data))})
    stage = resolve_stage(config, ranks.world_size)
    config = stage.config
    if ranks.rank == 0:
        check_start(config)
    folder = RunFolder(config, ranks.rank)
    lock: RunLock | None = None
    try:
        lock = RunLock(folder.prepare()) if ranks.rank == 0 else None
        engine = build_engine(config, stage.architecture, stage.names)
        engine.barrier()
        _train(stage, engine, watch, folder, lock)
        engine.close()
    except BaseException as error:
        # The process group is left as it is: leaving it could wait for ranks that are inside a collective.
        log.exception("rank %d failed", ranks.rank)
        if lock is not None and not folder.accepted:
            lock.withdraw()
        folder.refuse(keep_logs=not isinstance(error, UserError))
        raise
    finally:
        if lock is not None:
            lock.release()


def _train(stage: Stage, engine: Engine, watch: LoadWatch | None, folder: RunFolder, lock: RunLock | None) -> None:
    """Everything between joining the other ranks and leaving them."""
    config = stage.config
    messages = check_nodes(engine, stage.folder)
    prepared = prepare(config, stage, engine)
    folder.accept()
    run = begin(prepared)
    if lock is not None:
        run.check_owner = lock.check
    busy = None if watch is None else watch.busy()
    run.threads, threads = set_threads(config, stage.architecture, engine, run.threads or None, busy)
    for message in [*messages, *([threads] if threads else [])]:
        run.tracker.message(message)
    if engine.is_main:
        write_status(stage.folder, "running", run.step, config.total_steps)
    try:
        train(run)
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


def prepare(config: RunConfig, stage: Stage, engine: Engine) -> Prepared:
    """Check everything and restore the run from its own newest checkpoint, else start it from its parent. Writes
    nothing. Collective.

    Raises:
        UserError: on every rank, for whatever does not fit.
    """
    messages: list[str] = []
    checkpoint = find_checkpoint(engine, stage.folder / "checkpoints", messages.append)
    state = on_every_rank(engine, lambda: None if checkpoint is None else read_run_state(checkpoint))

    def look() -> list[WeightEntry]:
        check_trackers(config.tracking)
        if state is None:
            return stage.planned
        messages.extend(check_same_stage(config, stage.folder))
        check_weight_log(stage.folder, state)
        return WeightLog(stage.folder / WEIGHT_LOG).entries()

    hooks = on_every_rank(engine, lambda: _hooks(config, checkpoint, state))
    entries = engine.broadcast(on_every_rank(engine, lambda: look() if engine.is_main else None))
    feed = on_every_rank(engine, lambda: _feed(config, stage, engine, state, entries))
    position = _fill(config, stage, engine, checkpoint, state, messages)
    return Prepared(config, stage, engine, feed, position, hooks, state is not None, messages + stage.messages)


def begin(prepared: Prepared) -> Run:
    """Write what a run begins with, and make its record of what follows. Collective."""
    config, stage, engine = prepared.config, prepared.stage, prepared.engine
    if engine.is_main:
        write_run_files(config, stage, started=prepared.started)
        if not prepared.started:
            weight_log = WeightLog(stage.folder / WEIGHT_LOG)
            for entry in stage.planned:
                weight_log.append(entry.sample, entry.weights, entry.reason, entry.objective)
    engine.barrier()
    position = prepared.position
    tracker = Tracker(
        stage.folder,
        config.tracking,
        [domain.name for domain in stage.evaluated],
        config.total_steps,
        resumed_step=position.step,
        config_dump=config.model_dump(mode="json"),
        is_main=engine.is_main,
    )
    for message in prepared.messages:
        tracker.message(message)
    schedule = LearningRate(config.schedule, config.total_tokens, config.tokens_per_step)
    run = Run(config, stage, engine, prepared.feed, schedule, tracker, position.step, position.tokens)
    run.last_learning_rate, run.threads, run.hooks = position.learning_rate, position.threads, prepared.hooks
    set_up_hooks(run, position.hooks, position.checkpoint)
    return run


def _hooks(config: RunConfig, checkpoint: Path | None, state: dict[str, Any] | None) -> list[Hook]:
    """The hooks of the stage, after refusing a checkpoint that holds the state of others."""
    hooks = build_hooks(config)
    if checkpoint is not None and state is not None:
        check_saved_hooks(hooks, state["hooks"], checkpoint)
    return hooks


def _feed(
    config: RunConfig, stage: Stage, engine: Engine, state: dict[str, Any] | None, entries: list[WeightEntry]
) -> Feed:
    """The samples from here on, after refusing data or a mixer that are not those of the checkpoint."""
    drawn = None if state is None else state["sampler"]
    if state is not None and "mixture" in state["hooks"]:
        stage.controller().load_state_dict(state["hooks"]["mixture"])
    return Feed(
        stage.sampler(drawn, entries),
        stage.trained,
        global_batch_size=config.batch.global_batch_size,
        total_samples=config.total_steps * config.batch.global_batch_size,
        rank=engine.data_parallel_rank,
        num_ranks=engine.data_parallel_size,
        vocab_size=stage.architecture.vocab_size,
        objective=stage.objective(drawn, entries),
        conditioning=stage.conditioning(),
    )


def _fill(
    config: RunConfig,
    stage: Stage,
    engine: Engine,
    checkpoint: Path | None,
    state: dict[str, Any] | None,
    messages: list[str],
) -> Position:
    """Give the model its weights: the run's own, the parent's, or random ones. Collective."""
    parent = stage.origin.parent
    messages += notes_on(stage.architecture)
    if checkpoint is not None and state is not None:
        position = on_every_rank(engine, lambda: restore(engine, config, checkpoint, state, messages))
        messages.append(f"resumed from {checkpoint}")
        return position
    if parent is None:
        messages.append(f"random weights, {engine.parameter_count():,} parameters")
    elif parent.checkpoint is not None:
        damage = find_damage(engine, parent.checkpoint)
        if damage is not None:
            raise UserError(
                f"parent={parent.checkpoint} is damaged: {damage}", fix="name another checkpoint of the run as parent"
            )
        engine.load(parent.checkpoint / MODEL, optimizer=config.keeps_optimizer_state)
        messages.append(f"weights of {parent.checkpoint}, optimizer state {config.optimizer_state}")
    else:
        engine.import_huggingface(parent.folder)
        compared = check_import(engine, parent.folder, config, stage.architecture)
        messages.append(f"weights of {parent.folder}, {compared}")
    return Position()


def on_every_rank(engine: Engine, action: Callable[[], Result]) -> Result:
    """What an action gives on this rank; a refusal on one rank is one on all, before any of them writes. Collective.

    Raises:
        UserError: on every rank.
    """
    error: UserError | None = None
    try:
        result = action()
    except UserError as problem:
        error = problem
    found = engine.gather(None if error is None else (error.message, error.fix))
    if error is not None:
        raise error
    for other in found:
        if other is not None:
            raise UserError(other[0], fix=other[1])
    return result

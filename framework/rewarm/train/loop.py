"""The training loop. It names no parallelism, no mixer and no schedule."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rewarm.train.hooks.base import Hook
from rewarm.train.run import Run, StepRecord


def train(run: Run, hooks: Sequence[Hook]) -> None:
    """Train until the stage ends or a hook asks to stop.

    Hooks are called in the order given, which is the same on every rank, so that their collectives match. After an
    exception nothing collective is called: other ranks may be anywhere.

    Args:
        run: positioned after its last finished step.
        hooks: what happens beside the steps.
    """
    if not run.finished:
        run.engine.dry_run(run.feed.peek())
    for hook in hooks:
        hook.start(run)
    while not run.finished:
        train_one_step(run, hooks)
    for hook in hooks:
        hook.finish(run)


def train_one_step(run: Run, hooks: Sequence[Hook]) -> None:
    """One step and what happens beside it. The hooks must have been started."""
    started = time.perf_counter()
    fed = run.feed.next()
    learning_rate = run.learning_rate.at(run.tokens)
    result = run.engine.train_step(fed.batch, learning_rate)
    record = StepRecord(fed, result, learning_rate, time.perf_counter() - started)
    run.record(record)
    for hook in hooks:
        hook.after_step(run, record)

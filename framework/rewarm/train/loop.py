"""The training loop. It names no parallelism, no mixer and no schedule."""

from __future__ import annotations

import time

from rewarm.train.hooks.build import call_all
from rewarm.train.run import Run, StepRecord


def train(run: Run) -> None:
    """Train until the stage ends or a hook asks to stop.

    The run's hooks are called in their order, which is the same on every rank, so that their collectives match. After
    an exception nothing collective is called: other ranks may be anywhere.

    Args:
        run: positioned after its last finished step, with hooks that are set up.
    """
    try:
        if not run.finished:
            run.engine.dry_run(run.feed.peek())
        for hook in run.hooks:
            hook.start(run)
        while not run.finished:
            train_one_step(run)
        for hook in run.hooks:
            hook.finish(run)
    except BaseException as error:
        problem = error
        call_all(run.hooks, lambda hook: hook.on_error(run, problem))
        raise
    finally:
        call_all(run.hooks, lambda hook: hook.close(run))


def train_one_step(run: Run) -> None:
    """One step and what happens beside it. The hooks must have been started."""
    started = time.perf_counter()
    fed = run.feed.next()
    learning_rate = run.learning_rate.at(run.tokens)
    result = run.engine.train_step(fed.batch, learning_rate)
    record = StepRecord(fed, result, learning_rate, time.perf_counter() - started)
    run.record(record)
    for hook in run.hooks:
        hook.after_step(run, record)

"""Saving the state of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewarm.checkpoint.distributed import save_checkpoint
from rewarm.config.registry import HOOKS
from rewarm.train.hooks.base import Hook
from rewarm.train.state import checkpoint_state, prepare_sharded, write_sharded

if TYPE_CHECKING:
    from rewarm.train.run import Run, StepRecord


@HOOKS.register("checkpoint")
class CheckpointHook(Hook):
    """A checkpoint every ``checkpoint.interval``, and after the last step of an invocation, whatever ended it.

    It stands last, so that it holds what the others changed.
    """

    name = "checkpoint"
    order = 900

    def setup(self, run: Run) -> None:
        """Note where the run stands, which is either saved already or step 0."""
        self._interval = run.config.steps(run.config.checkpoint.interval)
        self._saved = run.step

    def after_step(self, run: Run, record: StepRecord) -> None:
        """Save when it is due."""
        at_interval = self._interval is not None and run.step % self._interval == 0
        if at_interval or run.finished:
            self._save(run)

    def finish(self, run: Run) -> None:
        """Save where a stop was asked for outside a step."""
        if self._saved != run.step:
            self._save(run)

    def _save(self, run: Run) -> None:
        run.check_owner()
        run.tracker.sync()
        checkpoint = save_checkpoint(
            run.engine,
            run.folder / "checkpoints",
            run.step,
            lambda folder: prepare_sharded(run, folder),
            lambda folder: write_sharded(run, folder),
            checkpoint_state(run),
            run.config.checkpoint.keep,
        )
        self._saved = run.step
        if run.engine.is_main:
            # After the checkpoint is there: a lineage with tokens stands for one that a resume can go on from.
            lineage = run.stage.lineage(run.last_learning_rate, run.tokens, run.feed.cursors(), run.tracker.last_losses)
            lineage.save(run.folder)
        run.tracker.message(f"saved {checkpoint}")

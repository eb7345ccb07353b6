"""Held-out losses of every domain, old and new."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewarm.config.registry import HOOKS
from rewarm.evaluation.held_out import HeldOutLoss, evaluate_domain
from rewarm.tracking.metrics import evaluation_line
from rewarm.train.hooks.base import Hook

if TYPE_CHECKING:
    from rewarm.train.run import Run, StepRecord


@HOOKS.register("evaluation")
class EvaluationHook(Hook):
    """An evaluation at step 0, at the end, and every ``evaluation.interval`` between.

    The run's evaluation file says which was the last.
    """

    name = "evaluation"
    order = 200

    def setup(self, run: Run) -> None:
        """Find the last evaluation. Collective."""
        self._interval = run.config.steps(run.config.evaluation.interval)
        self._last = run.tracker.last_evaluated_step if run.engine.is_main else None
        self._last = run.engine.broadcast(self._last)

    def start(self, run: Run) -> None:
        """Make the evaluation that is due at this step if an interrupted run has not made it."""
        if self._due(run):
            self._evaluate(run)

    def after_step(self, run: Run, record: StepRecord) -> None:
        """Evaluate when it is due; a run that is asked to stop leaves it to the resume."""
        if run.stop_reason is None and self._due(run):
            self._evaluate(run)

    def _due(self, run: Run) -> bool:
        if run.step == self._last:
            return False
        at_interval = self._interval is not None and run.step % self._interval == 0
        return run.step == 0 or run.step == run.config.total_steps or at_interval

    def _evaluate(self, run: Run) -> None:
        settings, vocab_size = run.config.evaluation, run.stage.architecture.vocab_size
        windows, size = settings.windows_per_domain, run.config.evaluation_micro_batch_size
        losses: list[HeldOutLoss] = []
        for domain in run.stage.evaluated:
            if run.poll_stop():
                return
            losses.append(evaluate_domain(run.engine, domain, windows, size, vocab_size))
        run.tracker.evaluation(
            evaluation_line(
                step=run.step,
                tokens=run.tokens,
                domain_names=[domain.name for domain in run.stage.evaluated],
                loss_sums=[loss.total for loss in losses],
                token_counts=[loss.num_tokens for loss in losses],
                bytes_per_token=[loss.bytes_per_token for loss in losses],
            )
        )
        self._last = run.step

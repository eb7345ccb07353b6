"""Metrics lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarm.config.registry import HOOKS
from rewarm.mixing.weights import TOTAL
from rewarm.tracking.metrics import MetricsLine, metrics_line
from rewarm.train.hooks.base import Hook

if TYPE_CHECKING:
    from rewarm.train.run import Run, StepRecord


@HOOKS.register("tracking")
class TrackingHook(Hook):
    """One line every ``tracking.interval`` steps; losses cover all steps since the line before."""

    name = "tracking"
    order = 100
    transient = ("_seconds", "_steps")
    """The speed of a line is that of the steps of one invocation."""

    def setup(self, run: Run) -> None:
        """Begin an interval."""
        num_domains = len(run.stage.names)
        self._loss_sums = np.zeros(num_domains)
        self._counts = np.zeros(num_domains, dtype=np.int64)
        self._seconds, self._steps = 0.0, 0

    def after_step(self, run: Run, record: StepRecord) -> None:
        """Add the step, and write a line when the interval is full."""
        self._loss_sums += record.result.loss_sums
        self._counts += record.result.token_counts
        self._seconds += record.seconds
        self._steps += 1
        if run.step % run.config.tracking.interval == 0 or run.step == run.config.total_steps:
            run.tracker.step(self._line(run, record))
            self._loss_sums[:], self._counts[:] = 0.0, 0
            self._seconds, self._steps = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """The sums of the interval that is open at a checkpoint."""
        return {"loss_sums": self._loss_sums.tolist(), "token_counts": self._counts.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self._loss_sums = np.array(state["loss_sums"], dtype=np.float64)
        self._counts = np.array(state["token_counts"], dtype=np.int64)

    def _line(self, run: Run, record: StepRecord) -> MetricsLine:
        return metrics_line(
            step=run.step,
            tokens=run.tokens,
            learning_rate=record.learning_rate,
            grad_norm=record.result.grad_norm,
            tokens_per_second=self._steps * run.config.tokens_per_step / self._seconds,
            sample_hash=record.fed.sample_hash,
            domain_names=run.stage.names,
            loss_sums=self._loss_sums.tolist(),
            token_counts=self._counts.tolist(),
            weights=(record.fed.weights / TOTAL).tolist(),
            objective=None if record.fed.objective is None else record.fed.objective.tolist(),
        )

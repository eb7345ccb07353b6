"""Metrics lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rewarm.mixing.weights import TOTAL
from rewarm.tracking.metrics import MetricsLine, metrics_line
from rewarm.train.hooks.base import Hook

if TYPE_CHECKING:
    from rewarm.train.run import Run, StepRecord


class TrackingHook(Hook):
    """One line every ``tracking.interval`` steps; losses cover all steps since the line before."""

    def start(self, run: Run) -> None:
        """Begin an interval; a resume starts at a checkpoint, which :class:`CheckpointHook` lets fall on a line's end
        or carries the open interval across."""
        num_domains = len(run.stage.names)
        saved = run.extra_state.get("tracking", {})
        self._loss_sums = np.array(saved.get("loss_sums", [0.0] * num_domains), dtype=np.float64)
        self._counts = np.array(saved.get("token_counts", [0] * num_domains), dtype=np.int64)
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
        run.extra_state["tracking"] = {"loss_sums": self._loss_sums.tolist(), "token_counts": self._counts.tolist()}

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

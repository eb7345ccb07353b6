"""A run while it trains: what the loop and its hooks share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rewarm.config.run import RunConfig
from rewarm.engine.base import Engine, StepResult
from rewarm.schedule.learning_rate import LearningRate
from rewarm.tracking.tracker import Tracker
from rewarm.train.feed import FedStep, Feed
from rewarm.train.hooks.base import Hook
from rewarm.train.skipped import MOST_SKIPPED, too_many
from rewarm.train.stage import Stage


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished step."""

    fed: FedStep
    result: StepResult
    learning_rate: float
    seconds: float


@dataclass(slots=True)
class Run:
    """One stage on its ranks. ``step`` and ``tokens`` count what is trained and are the same on every rank."""

    config: RunConfig
    stage: Stage
    engine: Engine
    feed: Feed
    learning_rate: LearningRate
    tracker: Tracker
    step: int = 0
    tokens: int = 0
    threads: list[int] = field(default_factory=list)
    """CPU threads of each rank; a resume on this layout keeps them, since sums in other parts may round otherwise."""
    last_learning_rate: float | None = None
    """Of the last finished step; None before the first."""
    skipped_in_a_row: int = 0
    """Steps up to the last finished one whose update was not made."""
    updated: bool = False
    """An update was made since the start or the resume."""
    stop_reason: str | None = None
    """Set by a hook that ends the run after this step."""
    poll_stop: Callable[[], bool] = lambda: False
    """Ask between the parts of something long whether a stop was requested meanwhile. Collective."""
    check_owner: Callable[[], None] = lambda: None
    """Raise if the run may belong to another process by now; on the main rank, before it writes a checkpoint."""
    hooks: list[Hook] = field(default_factory=list)
    """What happens beside the steps, in the order in which it is called."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.stage.folder

    @property
    def finished(self) -> bool:
        """True when this invocation has nothing more to train."""
        return self.stop_reason is not None or self.step >= self.config.last_step

    def record(self, record: StepRecord) -> None:
        """Count a finished step.

        Raises:
            UserError: if the updates of :data:`~rewarm.train.skipped.MOST_SKIPPED` steps in a row were skipped.
            FloatingPointError: if the loss is not finite and the engine did not skip the step.
        """
        self.step += 1
        self.last_learning_rate = record.learning_rate
        self.tokens += self.config.tokens_per_step
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record.result.skipped else 0
        if record.result.skipped:
            self.tracker.message(f"step {self.step}: update skipped, the gradient is not finite")
        if self.skipped_in_a_row == MOST_SKIPPED:
            names = [] if self.updated else self.stage.names
            raise too_many(self.config, names, self.step, record.result, updated=self.updated)
        self.updated = self.updated or not record.result.skipped
        if not record.result.skipped and not math.isfinite(record.result.loss):
            raise FloatingPointError(f"the loss of step {self.step} is {record.result.loss}")

"""Weights that follow the losses: after an evaluation the mixer decides, and a later sample obeys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rewarm.config.registry import HOOKS
from rewarm.evaluation.held_out import rotated_windows
from rewarm.mixing.controller import Change, Gradients
from rewarm.mixing.permutation import order_key
from rewarm.mixing.weight_log import WeightLog
from rewarm.tracking.console import weights_line
from rewarm.tracking.metrics import read_lines
from rewarm.train.hooks.base import Hook

if TYPE_CHECKING:
    from rewarm.train.run import Run, StepRecord


GRADIENT_CHUNK = 8
"""Windows of one gradient of which the spread is measured. What a forward pass takes at once is the engine's matter:
the weights must not depend on it."""


@HOOKS.register("mixture")
class MixtureHook(Hook):
    """Updates a closed-loop mixer at every evaluation; does nothing under a mixer whose weights are known ahead.

    The losses are read back from the run's evaluation file, so that an update that an interruption came before is made
    by the resume without another evaluation.
    """

    name = "mixture"
    order = 300

    def setup(self, run: Run) -> None:
        """Build the controller."""
        self._total_samples = run.config.total_steps * run.config.batch.global_batch_size
        self._controller = run.stage.controller()
        self._interval = run.config.steps(run.config.evaluation.interval)
        self._log = WeightLog(run.folder / "mixture.jsonl") if run.engine.is_main else None

    def start(self, run: Run) -> None:
        """Tell of the changes that are planned, and make the update that is due."""
        for entry in run.stage.planned:
            if entry.sample > run.step * run.config.batch.global_batch_size:
                run.tracker.message(weights_line(entry))
        self._update(run)

    def after_step(self, run: Run, record: StepRecord) -> None:
        """Add the step's losses, and update after an evaluation."""
        if self._controller.is_active:
            self._controller.observe(record.result.loss_sums, record.result.token_counts)
            self._update(run)

    def _update(self, run: Run) -> None:
        """Collective at the steps where an evaluation is due, which are the same on every rank."""
        if not self._controller.is_active:
            return
        at_sample = run.feed.first_free_sample
        is_due = self._interval is not None and run.step % self._interval == 0
        if is_due and self._controller.last_step < run.step and at_sample < self._total_samples:
            gradients = self._gradients(run)
            change = run.engine.broadcast(self._propose(run, at_sample, gradients) if run.engine.is_main else None)
            if change is not None:
                run.feed.schedule(self._controller.commit(change, self._log))
                run.tracker.message(weights_line(change.entry))

    def state_dict(self) -> dict[str, Any]:
        """The controller's, where evaluations can change the weights."""
        return self._controller.state_dict() if self._controller.is_active else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises:
            UserError: if the held-out text of a domain that steers the weights is not what it was.
        """
        self._controller.load_state_dict(state)

    def _gradients(self, run: Run) -> Gradients | None:
        """What the mixer reads of the new domains' gradients, on the held-out windows whose turn it is; None if it
        reads none, or a stop leaves the update to the resume. Collective."""
        if not self._controller.mixer.needs_gradients or run.stop_reason is not None:
            return None
        assert self._interval is not None
        config, new = run.config, run.stage.evaluated[: len(run.config.data)]
        count, turn = config.gradient_windows, run.step // self._interval
        windows = []
        for domain in new:
            key = order_key(config.seed, domain.held_out_fingerprint, 0)
            windows.append(rotated_windows(domain.held_out, count, turn, key))
            domain.check_token_ids(windows[-1], run.stage.architecture.vocab_size, "held-out")
        found = run.engine.domain_gradients(windows, GRADIENT_CHUNK)
        return found.products, found.squared_norms, found.variances

    def _propose(self, run: Run, at_sample: int, gradients: Gradients | None) -> Change | None:
        """The change of this step's evaluation; None if a stop came before it."""
        assert self._log is not None
        if self._controller.mixer.needs_gradients and gradients is None:
            return None
        lines = [line for line in read_lines(run.folder / "evaluation.jsonl") if line["step"] == run.step]
        if not lines:
            return None
        measured = {name: domain["loss"] for name, domain in lines[-1]["domains"].items()}
        losses = {name: math.nan if loss is None else float(loss) for name, loss in measured.items()}
        return self._controller.propose(run.step, losses, at_sample, run.feed.sampler, self._log, gradients)

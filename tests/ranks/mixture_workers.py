"""``rewarm train`` as one of the ranks that a launcher started, with a death at a chosen step."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

from rewarm.cli.train import train
from rewarm.data.domain import Domain
from rewarm.engine.base import Engine
from rewarm.evaluation.held_out import HeldOutLoss
from rewarm.train.hooks import evaluation
from rewarm.train.hooks.base import Hook
from rewarm.train.hooks.mixture import MixtureHook
from rewarm.train.run import Run, StepRecord


def train_stage(
    folder: Path, config: str, overrides: list[str], killed_at: int | None = None, blind_at: int | None = None
) -> None:
    """Train in a folder, up to its end or to SIGKILL after the weights of a step were decided.

    Args:
        folder: to work in.
        config: the stage.
        overrides: as on the command line.
        killed_at: the step after which every rank dies.
        blind_at: the step whose evaluation gives NaN for the domain python.
    """
    os.chdir(folder)
    if killed_at is not None:
        _die_after(killed_at)
    if blind_at is not None:
        _lose_sight_at(blind_at)
    train(Path(config), overrides)


def _lose_sight_at(step: int) -> None:
    evaluate, look = evaluation.evaluate_domain, evaluation.EvaluationHook._evaluate

    def blind(engine: Engine, domain: Domain, *rest: int) -> HeldOutLoss:
        found = evaluate(engine, domain, *rest)
        return replace(found, total=math.nan) if domain.name == "python" else found

    def looked(self: evaluation.EvaluationHook, run: Run) -> None:
        evaluation.evaluate_domain = blind if run.step == step else evaluate
        look(self, run)

    evaluation.EvaluationHook._evaluate = looked  # type: ignore[method-assign]


def _die_after(step: int) -> None:
    decide = MixtureHook.after_step

    def after_step(self: Hook, run: Run, record: StepRecord) -> None:
        assert isinstance(self, MixtureHook)
        decide(self, run, record)
        if run.step == step:
            run.engine.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

    MixtureHook.after_step = after_step  # type: ignore[method-assign]

"""What happens beside the steps, in one fixed order."""

from __future__ import annotations

from rewarm.train.hooks.base import Hook
from rewarm.train.hooks.checkpoint import CheckpointHook
from rewarm.train.hooks.evaluation import EvaluationHook
from rewarm.train.hooks.mixture import MixtureHook
from rewarm.train.hooks.signals import SignalHook
from rewarm.train.hooks.tracking import TrackingHook

__all__ = ["Hook", "standard_hooks"]


def standard_hooks() -> list[Hook]:
    """The hooks of every run, in the order in which they are called after each step.

    Signals come first, so that the others know of a stop: evaluation is then left to the resume, which finds it due,
    and the checkpoint is written at once. The checkpoint comes last, so that it holds what the others changed.
    """
    return [SignalHook(), TrackingHook(), EvaluationHook(), MixtureHook(), CheckpointHook()]

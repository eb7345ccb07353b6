"""``rewarm train`` as one of the ranks that a launcher started, with a death at a chosen step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from rewarm.cli.train import train
from rewarm.train.hooks.base import Hook
from rewarm.train.hooks.mixture import MixtureHook
from rewarm.train.run import Run, StepRecord


def train_stage(folder: Path, config: str, overrides: list[str], killed_at: int | None = None) -> None:
    """Train in a folder, up to its end or to SIGKILL after the weights of a step were decided."""
    os.chdir(folder)
    if killed_at is not None:
        _die_after(killed_at)
    train(Path(config), overrides)


def _die_after(step: int) -> None:
    decide = MixtureHook.after_step

    def after_step(self: Hook, run: Run, record: StepRecord) -> None:
        assert isinstance(self, MixtureHook)
        decide(self, run, record)
        if run.step == step:
            run.engine.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

    MixtureHook.after_step = after_step  # type: ignore[method-assign]

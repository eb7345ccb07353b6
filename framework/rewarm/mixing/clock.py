"""What a stage's durations and triggers are counted by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rewarm.errors import UserError


@dataclass(frozen=True, slots=True)
class Clock:
    """What a stage's durations and triggers are counted by."""

    total_steps: int
    global_batch_size: int
    steps: Callable[[str], int]
    """A duration in whole steps."""
    learning_rate: Callable[[int], float]
    """Learning rate of a step, counted from 0."""


def falls_to(fraction: float, clock: Clock, where: str) -> int:
    """The first step after the peak whose learning rate is at most this fraction of it.

    Args:
        fraction: of the peak.
        clock: of the stage.
        where: the setting, for the message.

    Raises:
        UserError: if the schedule does not fall so far.
    """
    rates = [clock.learning_rate(step) for step in range(clock.total_steps)]
    peak = int(np.argmax(rates))
    below = [step for step in range(peak, clock.total_steps) if rates[step] <= fraction * rates[peak]]
    if not below:
        raise UserError(
            f"{where} waits for {fraction} of the peak learning rate, but the lowest after it is "
            f"{min(rates[peak:]) / rates[peak]:.3g} of it",
            fix="let the schedule decay further, or raise the fraction",
        )
    return below[0]


def inside(step: int, clock: Clock, what: str) -> int:
    """The step itself.

    Raises:
        UserError: if it is not after the first step and before the last; ``what`` names the setting.
    """
    if not 0 < step < clock.total_steps:
        raise UserError(
            f"{what} is step {step}, and the stage has {clock.total_steps} steps",
            fix="let it begin after the first step and before the last",
        )
    return step

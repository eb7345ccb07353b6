"""``schedule.start: parent``: the warm-up rises from the learning rate at which the parent stopped."""

from __future__ import annotations

import math

from rewarm.config.run import RunConfig
from rewarm.errors import UserError
from rewarm.replay.lineage import Lineage


def with_parent_rate(config: RunConfig, lineage: Lineage) -> RunConfig:
    """The configuration with ``schedule.start: parent`` replaced by the rate of the parent's last step.

    A run keeps the number: its own lineage says it at a resume, where the parent may be gone or have gone on.

    Args:
        config: the stage.
        lineage: its ancestors, without the run itself.

    Raises:
        UserError: if nothing says what that rate was, or it is above the peak.
    """
    if config.schedule.start != "parent":
        return config
    parent = lineage.parent
    rate = parent.final_learning_rate if parent is not None else None
    if rate is None or not math.isfinite(rate) or rate < 0:
        who = config.parent if parent is None else f"{parent.path} ({'run' if parent.kind == 'run' else 'a model'})"
        raise UserError(
            f"schedule.start=parent, but nothing says at which learning rate {who} stopped: its lineage.json has none",
            fix="write the rate itself, such as schedule.start=3e-5, or leave it out to start from 0",
        )
    if rate > config.schedule.peak:
        raise UserError(
            f"schedule.start=parent is {rate:.6g}, the last rate of {config.parent}, and above "
            f"schedule.peak={config.schedule.peak:g}",
            fix="raise the peak, or write a rate below it as schedule.start",
        )
    return config.model_copy(update={"schedule": config.schedule.model_copy(update={"start": rate})})

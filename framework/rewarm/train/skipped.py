"""What to say of a run whose updates are skipped, step after step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewarm.config.run import RunConfig
from rewarm.engine.base import StepResult
from rewarm.errors import UserError

MOST_SKIPPED = 10
"""Steps in a row without an update after which a run ends. One bad batch is survived; a model whose every gradient is
not finite would otherwise train to its end without learning anything."""


def too_many(config: RunConfig, domains: Sequence[str], step: int, result: StepResult, *, updated: bool) -> UserError:
    """The end of a run whose last :data:`MOST_SKIPPED` updates were skipped.

    Args:
        config: of the run. Its weights are finite: those of a parent or checkpoint were looked at when they were read.
        domains: names, in the order of the result's; not needed where an update was made.
        step: the last one.
        result: its losses.
        updated: an update was made since the run was started or resumed.
    """
    what = f"the gradients of {MOST_SKIPPED} steps in a row were not finite, the last of them at step {step}"
    first = step - MOST_SKIPPED + 1
    if updated:
        return UserError(
            what,
            fix=f"start another stage from a checkpoint before step {first}, with a lower schedule.peak or a longer "
            "schedule.warmup",
        )
    trained = result.token_counts > 0
    broken = [name for name, bad in zip(domains, trained & ~np.isfinite(result.loss_sums), strict=True) if bad]
    what += "; no update has been made before, so that the learning rate is not the reason"
    if broken and len(broken) < trained.sum():
        return UserError(
            f"{what}. The loss is finite in other domains and not in {', '.join(broken)}",
            fix=f"look at the tokens of {', '.join(broken)}: rewarm data inspect",
        )
    source = "the model" if config.parent is None else f"parent={config.parent}"
    why = f"The loss of {source} is itself not finite" if broken else f"The loss of {source} is {result.loss:.4g}"
    fix = "measure it first: rewarm evaluate" if config.parent is not None else "set a smaller model.initializer_range"
    if config.precision != "float32":
        fix += "; try precision=float32, in case it overflows in " + config.precision
    return UserError(f"{what}. {why}", fix=fix)

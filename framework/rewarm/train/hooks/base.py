"""The interface of a hook."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewarm.train.run import Run, StepRecord


class Hook:
    """Something that happens beside the steps. Every method is called on all ranks."""

    def start(self, run: Run) -> None:
        """Before the first step of this invocation."""

    def after_step(self, run: Run, record: StepRecord) -> None:
        """After each step; ``run.step`` already counts it."""

    def finish(self, run: Run) -> None:
        """After the last step of this invocation, whatever ended it but an error."""

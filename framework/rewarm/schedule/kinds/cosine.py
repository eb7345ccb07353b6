"""Cosine: from the peak to the minimum over the rest of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewarm.config.registry import SCHEDULES
from rewarm.schedule.kinds.base import Schedule
from rewarm.schedule.phase import Phase, Span

if TYPE_CHECKING:
    from rewarm.config.training import ScheduleConfig


@SCHEDULES.register("cosine")
class CosineSchedule(Schedule):
    """A cosine from the peak to the minimum over the rest of the run (Loshchilov & Hutter 2017)."""

    @classmethod
    def phases(cls, config: ScheduleConfig, settings: Any, span: Span, warm: int) -> list[Phase]:
        """One."""
        return [Phase("cosine", warm, span.total_tokens, config.peak, config.minimum)]

"""Linear: from the peak to the minimum over the rest of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewarm.config.registry import SCHEDULES
from rewarm.schedule.kinds.base import Schedule
from rewarm.schedule.phase import Phase, Span

if TYPE_CHECKING:
    from rewarm.config.training import ScheduleConfig


@SCHEDULES.register("linear")
class LinearSchedule(Schedule):
    """A line from the peak to the minimum over the rest of the run (Defazio et al. 2023)."""

    @classmethod
    def phases(cls, config: ScheduleConfig, settings: Any, span: Span, warm: int) -> list[Phase]:
        """One."""
        return [Phase("linear", warm, span.total_tokens, config.peak, config.minimum)]

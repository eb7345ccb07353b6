"""Constant: the peak until the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewarm.config.registry import SCHEDULES
from rewarm.schedule.kinds.base import Schedule
from rewarm.schedule.phase import Phase, Span

if TYPE_CHECKING:
    from rewarm.config.training import ScheduleConfig


@SCHEDULES.register("constant")
class ConstantSchedule(Schedule):
    """The peak until the end."""

    uses = ()

    @classmethod
    def phases(cls, config: ScheduleConfig, settings: Any, span: Span, warm: int) -> list[Phase]:
        """One."""
        return [Phase("constant", warm, span.total_tokens, config.peak, config.peak)]

"""The interface of a schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from rewarm.schedule.phase import Phase, Span

if TYPE_CHECKING:
    from rewarm.config.training import ScheduleConfig


class Schedule(ABC):
    """The learning rate after the warm-up, as a list of phases. It has no state: a resume needs the configuration and
    the token count."""

    uses: ClassVar[tuple[str, ...]] = ("minimum",)
    """The settings of the section ``schedule`` that it follows besides peak, start and warmup; the others are refused.
    Its own settings stand in a section of its own, see :class:`rewarm.config.registry.Registry`."""
    durations: ClassVar[tuple[str, ...]] = ()
    """Those of ``uses`` that are lengths of phases, which together with the warm-up must fit into the stage."""

    @classmethod
    def check(cls, config: ScheduleConfig) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ValueError: naming the settings.
        """
        return

    @classmethod
    def unread(cls, config: ScheduleConfig) -> list[str]:
        """Settings of the section that no rate depends on. As it stands, those that the kind does not follow."""
        from rewarm.config.training import OPTIONAL

        return sorted(OPTIONAL - set(cls.uses))

    @classmethod
    @abstractmethod
    def phases(cls, config: ScheduleConfig, settings: Any, span: Span, warm: int) -> list[Phase]:
        """The phases after the warm-up; they cover [warm, total_tokens] without a gap. Empty ones are left out later.

        Args:
            config: the section ``schedule``.
            settings: the schedule's own section; None if it has none.
            span: the length of the stage.
            warm: tokens at which the warm-up ends, at the peak.
        """

"""Infinite: a constant rate that many stages continue from, and an anneal for those that are to be finished."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewarm.config.registry import SCHEDULES
from rewarm.config.section import ignored, parse_duration
from rewarm.schedule.kinds.wsd import WSDSchedule, check_decay
from rewarm.schedule.phase import Phase, Span

if TYPE_CHECKING:
    from rewarm.config.training import ScheduleConfig


@SCHEDULES.register("infinite")
class InfiniteSchedule(WSDSchedule):
    """A cosine from the peak to ``plateau`` over ``cooldown``, the plateau, and an anneal over the last ``decay``
    (Ibrahim et al. 2024; Singh et al. 2025)."""

    uses = ("minimum", "decay", "decay_shape", "plateau", "cooldown")
    durations = ("cooldown", "decay")

    @classmethod
    def check(cls, config: ScheduleConfig) -> None:
        """Refuse a plateau that is missing or out of place, and a decay that contradicts itself."""
        if config.plateau is None:
            raise ValueError("schedule.kind=infinite needs schedule.plateau, its constant rate")
        if config.minimum > config.plateau:
            raise ValueError(f"schedule.minimum={config.minimum} is above schedule.plateau={config.plateau}")
        if config.plateau < config.peak and parse_duration(config.cooldown)[0] == 0:
            raise ValueError(
                f"schedule.cooldown={config.cooldown} leaves a jump from schedule.peak={config.peak} to "
                f"schedule.plateau={config.plateau}: lengthen the cooldown or set peak to the plateau"
            )
        default = type(config).model_fields["cooldown"].default
        if config.plateau == config.peak and config.cooldown not in (default, "0 steps"):
            by = f"schedule.plateau={config.plateau}, which is the peak"
            raise ignored("schedule.cooldown", by, config.cooldown)
        check_decay(config)

    @classmethod
    def unread(cls, config: ScheduleConfig) -> list[str]:
        """A cooldown that goes nowhere, too."""
        return [*super().unread(config), *(["cooldown"] if config.plateau == config.peak else [])]

    @classmethod
    def phases(cls, config: ScheduleConfig, settings: Any, span: Span, warm: int) -> list[Phase]:
        """The cooldown, the plateau and the anneal."""
        assert config.plateau is not None, "check refuses infinite without it"
        cool, begin = warm + span.tokens(config.cooldown), span.total_tokens - span.tokens(config.decay)
        return [
            Phase("cosine", warm, cool, config.peak, config.plateau),
            Phase("constant", cool, begin, config.plateau, config.plateau),
            Phase(config.decay_shape, begin, span.total_tokens, config.plateau, config.minimum),
        ]

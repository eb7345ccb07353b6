"""WSD: warm-up, stable, decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from rewarm.config.registry import SCHEDULES
from rewarm.config.section import ignored, parse_duration
from rewarm.schedule.kinds.base import Schedule
from rewarm.schedule.phase import Phase, Span

if TYPE_CHECKING:
    from rewarm.config.training import ScheduleConfig


def check_decay(config: ScheduleConfig) -> None:
    """Refuse a final decay that contradicts itself.

    Raises:
        ValueError: naming the settings.
    """
    has_decay = parse_duration(config.decay)[0] > 0
    if config.minimum and not has_decay:
        raise ignored("schedule.minimum", f"schedule.decay={config.decay}", config.minimum)
    if not has_decay and config.decay_shape != type(config).model_fields["decay_shape"].default:
        raise ignored("schedule.decay_shape", f"schedule.decay={config.decay}", config.decay_shape)
    if has_decay and config.decay_shape == "exponential" and config.minimum == 0:
        raise ValueError("schedule.decay_shape=exponential never reaches schedule.minimum=0: set a minimum above 0")


@SCHEDULES.register("wsd")
class WSDSchedule(Schedule):
    """The peak, then a decay to the minimum over the last ``decay`` (Hu et al. 2024, "MiniCPM"; Hägele et al. 2024)."""

    uses: ClassVar[tuple[str, ...]] = ("minimum", "decay", "decay_shape")
    durations: ClassVar[tuple[str, ...]] = ("decay",)

    @classmethod
    def check(cls, config: ScheduleConfig) -> None:
        """Refuse a decay that contradicts itself."""
        check_decay(config)

    @classmethod
    def unread(cls, config: ScheduleConfig) -> list[str]:
        """The shape of a decay that is left out, too."""
        return [*super().unread(config), *(["decay_shape"] if parse_duration(config.decay)[0] == 0 else [])]

    @classmethod
    def phases(cls, config: ScheduleConfig, settings: Any, span: Span, warm: int) -> list[Phase]:
        """The plateau and the decay."""
        begin = span.total_tokens - span.tokens(config.decay)
        return [
            Phase("constant", warm, begin, config.peak, config.peak),
            Phase(config.decay_shape, begin, span.total_tokens, config.peak, config.minimum),
        ]

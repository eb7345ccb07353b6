"""From the configuration of a stage to its mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rewarm.config.registry import MIXERS
from rewarm.mixing.mixers.base import Mixer, MixerContext

if TYPE_CHECKING:
    from rewarm.config.mixture import MixtureConfig


def build_mixer(
    mixture: MixtureConfig,
    names: Sequence[str],
    weights: np.ndarray,
    steps: Callable[[str], int],
    reference: Callable[[str], Mapping[str, float]] = lambda place: {},
    batch_size: int = 64,
) -> Mixer:
    """The mixer of a stage's new domains.

    Args:
        mixture: the configuration section.
        names: the new domains.
        weights: float64 [K], the fractions that the stage starts with.
        steps: a duration in whole steps of the stage.
        reference: losses of the reference model that a path names, by domain.
        batch_size: samples of a step.

    Raises:
        UserError: if a setting names a domain that does not exist, or a file of targets cannot be read.
    """
    context = MixerContext(names, weights, steps, reference, batch_size)
    built: Mixer = MIXERS[mixture.mixer].target.build(context, mixture.settings)
    return built


def with_targets(mixture: MixtureConfig, names: Sequence[str]) -> MixtureConfig:
    """The section with a file of targets replaced by what it says of the new domains.

    A run keeps the numbers, not the name of the file: changed between two resumes it is another stage.

    Raises:
        UserError: if the file cannot be read or holds no targets.
    """
    from rewarm.mixing.mixers.target_settings import TargetSettings

    settings = mixture.settings
    if not isinstance(settings, TargetSettings):
        return mixture
    return mixture.model_copy(update={mixture.mixer: settings.resolved(names)})

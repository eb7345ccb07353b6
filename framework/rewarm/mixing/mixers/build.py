"""From the configuration of a stage to its mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rewarm.config.json_text import parse_json
from rewarm.config.mixture import (
    ADOConfig,
    AioliConfig,
    DoGEConfig,
    DoReMiConfig,
    DynamicBatchLoadingConfig,
    MixtureConfig,
    ODMConfig,
    PiKEConfig,
    SkillItConfig,
    VelocituneConfig,
)
from rewarm.errors import UserError
from rewarm.mixing.mixers.ado import ADOMixer
from rewarm.mixing.mixers.aioli import AioliRounds
from rewarm.mixing.mixers.base import Mixer, by_domain
from rewarm.mixing.mixers.doge import DoGEMixer
from rewarm.mixing.mixers.doremi import DoReMiMixer
from rewarm.mixing.mixers.dynamic_batch_loading import DynamicBatchLoadingMixer
from rewarm.mixing.mixers.fixed import StaticMixer
from rewarm.mixing.mixers.odm import ODMMixer
from rewarm.mixing.mixers.pike import PiKEMixer
from rewarm.mixing.mixers.skill_it import SkillItMixer
from rewarm.mixing.mixers.velocitune import VelocituneMixer


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
    settings = mixture.settings
    if isinstance(settings, VelocituneConfig):
        targets = by_domain(load_targets(settings.targets, names), names, "mixture.velocitune.targets")
        return VelocituneMixer(
            names, weights, targets,
            step_size=settings.step_size, floor=settings.floor, learned_margin=settings.learned_margin,
        )  # fmt: skip
    if isinstance(settings, DynamicBatchLoadingConfig):
        given_targets = load_targets(settings.targets, names)
        targets = by_domain(given_targets, names, "mixture.dynamic_batch_loading.targets")
        return DynamicBatchLoadingMixer(names, weights, targets, step_size=settings.step_size, floor=settings.floor)
    if isinstance(settings, DoReMiConfig):
        given = settings.reference
        losses = by_domain(reference(given) if isinstance(given, str) else given, names, "mixture.doremi.reference")
        return DoReMiMixer(names, weights, losses, step_size=settings.step_size, floor=settings.floor)
    if isinstance(settings, ODMConfig):
        return ODMMixer(names, weights, decay=settings.decay, warmup=steps(settings.warmup))
    if isinstance(settings, ADOConfig):
        return ADOMixer(
            names, weights,
            warmup=steps(settings.warmup), smoothing=settings.smoothing, credit_decay=settings.credit_decay,
            credit_power=settings.credit_power, floor=settings.floor,
        )  # fmt: skip
    if isinstance(settings, SkillItConfig):
        graph = graph_matrix(settings.graph, names)
        return SkillItMixer(names, weights, graph, step_size=settings.step_size, memory=settings.memory)
    if isinstance(settings, PiKEConfig):
        return PiKEMixer(
            names, weights,
            batch_size=batch_size, norm_factor=settings.norm_factor, variance_factor=settings.variance_factor,
        )  # fmt: skip
    if isinstance(settings, DoGEConfig):
        return DoGEMixer(
            names, weights, learning_rate=settings.learning_rate, regularisation=settings.regularisation
        )  # fmt: skip
    if isinstance(settings, AioliConfig):
        return AioliRounds(names, weights, **settings.model_dump())
    return StaticMixer(names, weights)


def with_targets(mixture: MixtureConfig, names: Sequence[str]) -> MixtureConfig:
    """The section with a file of targets replaced by what it says of the new domains.

    A run keeps the numbers, not the name of the file: changed between two resumes it is another stage.

    Raises:
        UserError: as :func:`load_targets`.
    """
    settings = mixture.settings
    if not isinstance(settings, VelocituneConfig | DynamicBatchLoadingConfig):
        return mixture
    resolved = settings.model_copy(update={"targets": load_targets(settings.targets, names)})
    return mixture.model_copy(update={mixture.mixer: resolved})


def load_targets(targets: Mapping[str, float] | str, names: Sequence[str]) -> dict[str, float]:
    """Targets given in place, or read from the file that ``rewarm mixture targets`` wrote.

    A file may hold more domains than the stage weighs, as the old ones that its pilot evaluated too; what is given in
    place is meant as it stands.

    Args:
        targets: as configured.
        names: the new domains.

    Raises:
        UserError: if the file cannot be read or holds no targets.
    """
    if not isinstance(targets, str):
        return dict(targets)
    try:
        value = parse_json(Path(targets).read_text(encoding="utf-8-sig"))["targets"]
        found = {str(name): float(loss) for name, loss in value.items()}
        return {name: found[name] for name in names if name in found}
    except OSError as error:
        raise UserError(
            f"cannot read the targets {targets}: {error.strerror}", fix="make them with: rewarm mixture targets"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{targets} holds no targets: {error}",
            fix='write {"targets": {"domain": loss}}, or run: rewarm mixture targets',
        ) from error


def graph_matrix(graph: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> np.ndarray:
    """A skills graph as float64 [K, K]; pairs that are left out are 0.

    Raises:
        UserError: if it names a domain that does not exist.
    """
    rows = {name: dict(graph.get(name, {})) for name in names}
    unknown = sorted((set(graph) | {to for row in graph.values() for to in row}) - set(names))
    if unknown:
        raise UserError(
            f"the graph of skill_it names {unknown[0]!r}, which is not one of {', '.join(names)}",
            fix="use the names of the new domains",
        )
    return np.array([[float(rows[a].get(b, 0.0)) for b in names] for a in names])

"""The mixture a stage starts with, and the changes that are known before it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewarm.config.mixture import (
    ConditioningConfig,
    MixtureConfig,
    PhaseConfig,
    ReplayConfig,
    TemperatureConfig,
    UniMaxConfig,
)
from rewarm.errors import UserError, ensure
from rewarm.mixing.mixers.fixed import temperature_weights, unimax_weights
from rewarm.mixing.objective import objective_weights
from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import check_weights, quantise


@dataclass(frozen=True, slots=True)
class Clock:
    """What a stage's durations and triggers are counted by."""

    total_steps: int
    global_batch_size: int
    steps: Callable[[str], int]
    """A duration in whole steps."""
    learning_rate: Callable[[int], float]
    """Learning rate of a step, counted from 0."""


def initial_weights(
    mixture: MixtureConfig,
    replay: ReplayConfig,
    tokens: Mapping[str, int],
    replayed: Mapping[str, float] | None = None,
    *,
    total_tokens: int | None = None,
) -> tuple[list[str], np.ndarray]:
    """Integer weights of a stage's first sample.

    Replay takes its fraction from the new domains, whose weights shrink by ``1 - fraction``: the number of tokens
    trained on does not change (compute-equivalent replay, Ibrahim et al. 2024).

    Args:
        mixture: how the new domains share what replay leaves.
        replay: the fraction that is replayed.
        tokens: training tokens of each new domain, in the order of the configuration.
        replayed: proportion of each replayed domain, any scale; see :func:`rewarm.replay.select.resolve_replay`.
        total_tokens: target tokens of the stage; mixer unimax needs it.

    Returns:
        Names (new domains first, then replayed ones) and int64 [K] summing to 2^32.

    Raises:
        UserError: if the weights are no mixture, or replay is asked for and nothing can be replayed.
    """
    replayed = replayed or {}
    if replay.fraction > 0 and not replayed:
        raise UserError(
            f"replay.fraction={replay.fraction}, but the lineage has no domain to replay",
            fix="set replay.fraction=0, or name the old data under data and give it a weight",
        )
    budget = None if total_tokens is None else total_tokens * (1 - replay.fraction)
    return blend(new_shares(mixture, tokens, budget), replayed, replay.fraction)


def planned_changes(
    mixture: MixtureConfig,
    replay: ReplayConfig,
    tokens: Mapping[str, int],
    replayed: Mapping[str, float],
    clock: Clock,
) -> list[WeightEntry]:
    """The changes of weights that do not depend on any loss: a cooldown of the temperature, and phases.

    Returns:
        Entries for the weight log, to be written and scheduled before the first step; those that the stage never
        reaches are refused.

    Raises:
        UserError: if a trigger lies outside the stage.
    """
    settings = mixture.settings
    changes: list[tuple[int, dict[str, float], str]] = []
    if isinstance(settings, TemperatureConfig) and settings.cooldown_at is not None:
        step = _inside(
            clock.steps(settings.cooldown_at), clock, f"mixture.temperature.cooldown_at={settings.cooldown_at}"
        )
        cool = temperature_weights(np.array(list(tokens.values())), settings.cooldown_temperature)
        changes.append(
            (step, dict(zip(tokens, cool.tolist(), strict=True)), f"temperature {settings.cooldown_temperature}")
        )
    for number, phase in enumerate(mixture.phases):
        if phase.loss_below is None:
            changes.append((_begin(phase, number, clock), phase.weights, f"phase {number}"))
    entries = []
    for step, shares, reason in sorted(changes, key=lambda change: change[0]):
        names, weights = blend({name: shares[name] for name in tokens}, replayed, replay.fraction)
        entries.append(planned_entry(mixture, step * clock.global_batch_size, names, weights, reason))
    return entries


def planned_entry(
    mixture: MixtureConfig, sample: int, names: Sequence[str], weights: np.ndarray, reason: str
) -> WeightEntry:
    """A line of the weight log that no loss decides, with the objective of the configuration.

    Args:
        mixture: the configuration section.
        sample: global sample index from which it holds.
        names: of all domains.
        weights: int64 [K] summing to 2^32.
        reason: why it changes.

    Raises:
        UserError: if ``mixture.objective`` names what is no domain, or wants a domain that is not sampled.
    """
    sampled = dict(zip(names, weights.tolist(), strict=True))
    if mixture.objective is None:
        return WeightEntry(sample, sampled, reason)
    check_objective(mixture.objective, sampled, reason)
    return WeightEntry(sample, sampled, reason, objective_weights(mixture.objective, sampled))


def check_phases_by_loss(mixture: MixtureConfig, replayed: Mapping[str, float], replay_fraction: float) -> None:
    """Refuse a phase that waits for a loss and would take the samples of a domain that the objective wants.

    Raises:
        UserError: as :func:`planned_entry` for a phase whose begin is known.
    """
    for number, phase in enumerate(mixture.phases):
        if mixture.objective is None or phase.loss_below is None:
            continue
        names, weights = blend(phase.weights, replayed, replay_fraction)
        check_objective(mixture.objective, dict(zip(names, weights.tolist(), strict=True)), f"phase {number}")


def check_objective(objective: Mapping[str, float], sampled: Mapping[str, int], reason: str) -> None:
    """Refuse an objective that names what is no domain, or wants what is not sampled.

    Args:
        objective: ``mixture.objective``.
        sampled: integer weights of all domains.
        reason: which blend that is, for the message.
    """
    for name, weight in objective.items():
        if name not in sampled:
            raise UserError(
                f"mixture.objective names {name!r}, which is neither a new nor a replayed domain of the stage",
                fix=f"name some of {', '.join(sampled)}",
            )
        if weight > 0 and sampled[name] == 0:
            raise UserError(
                f"mixture.objective gives {name!r} the weight {weight}, but nothing is sampled from it ({reason})",
                fix=f"give {name!r} a weight above 0 there, or leave it out of the objective",
            )


def _begin(phase: PhaseConfig, number: int, clock: Clock) -> int:
    where = f"mixture.phased.phases[{number}]"
    if phase.at is not None:
        return _inside(clock.steps(phase.at), clock, f"{where}.at={phase.at}")
    assert phase.learning_rate_fraction is not None
    return _falls_to(phase.learning_rate_fraction, clock, where)


def cooldown_sample(conditioning: ConditioningConfig, clock: Clock) -> int:
    """Global sample index at which metadata conditioning ends.

    Raises:
        UserError: if its trigger lies outside the stage.
    """
    where, fraction = "mixture.conditioning", conditioning.until_learning_rate_fraction
    if fraction is not None:
        return _falls_to(fraction, clock, where) * clock.global_batch_size
    until = conditioning.until or "90%"
    return _inside(clock.steps(until), clock, f"{where}.until={until}") * clock.global_batch_size


def _falls_to(fraction: float, clock: Clock, where: str) -> int:
    """The first step after the peak whose learning rate is at most this fraction of it."""
    rates = [clock.learning_rate(step) for step in range(clock.total_steps)]
    peak = int(np.argmax(rates))
    below = [step for step in range(peak, clock.total_steps) if rates[step] <= fraction * rates[peak]]
    if not below:
        raise UserError(
            f"{where} waits for {fraction} of the peak learning rate, but the lowest after it is "
            f"{min(rates[peak:]) / rates[peak]:.3g} of it",
            fix="let the schedule decay further, or raise the fraction",
        )
    return below[0]


def _inside(step: int, clock: Clock, what: str) -> int:
    if not 0 < step < clock.total_steps:
        raise UserError(
            f"{what} is step {step}, and the stage has {clock.total_steps} steps",
            fix="let it begin after the first step and before the last",
        )
    return step


def new_shares(mixture: MixtureConfig, tokens: Mapping[str, int], budget: float | None) -> dict[str, float]:
    """Weights of the new domains among themselves at the start, any scale.

    Args:
        mixture: the configuration section.
        tokens: training tokens of each new domain.
        budget: target tokens that the stage trains on new domains; mixer unimax needs it.
    """
    settings, sizes = mixture.settings, np.array(list(tokens.values()), dtype=np.float64)
    if isinstance(settings, TemperatureConfig):
        shares = temperature_weights(sizes, settings.temperature)
    elif isinstance(settings, UniMaxConfig):
        assert budget is not None, "unimax needs the stage's tokens"
        shares = unimax_weights(sizes, budget, settings.max_epochs)
    elif mixture.mixer == "proportional" or (mixture.mixer == "ado" and mixture.weights is None):
        shares = sizes
    else:
        weights = mixture.weights or dict.fromkeys(tokens, 1.0)
        return {name: weights[name] for name in tokens}
    return dict(zip(tokens, shares.tolist(), strict=True))


def blend(
    new: Mapping[str, float], replayed: Mapping[str, float], replay_fraction: float
) -> tuple[list[str], np.ndarray]:
    """Join new and replayed domains, each at its own scale, so that replay has the given fraction of all samples.

    Returns:
        Names and int64 [K] summing to 2^32.
    """
    clash = sorted(set(new) & set(replayed))
    ensure(not clash, f"domains {clash} are both new and replayed")
    shares = _scaled(new, 1 - replay_fraction)
    if replay_fraction > 0:
        shares |= _scaled(replayed, replay_fraction)
    else:
        shares |= dict.fromkeys(replayed, 0.0)
    return list(shares), quantise(list(shares.values()))


def _scaled(weights: Mapping[str, float], share: float) -> dict[str, float]:
    check_weights(list(weights.values()), list(weights))
    total = sum(weights.values())
    return {name: share * weight / total for name, weight in weights.items()}

"""What a mixer would do on a table of losses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewarm.errors import UserError, nearest
from rewarm.mixing.loss_table import LossLine
from rewarm.mixing.mixers import MIXERS
from rewarm.mixing.mixers.base import Mixer, Observation, by_domain
from rewarm.mixing.mixers.build import graph_matrix
from rewarm.mixing.mixers.fixed import StaticMixer, temperature_weights, unimax_weights
from rewarm.mixing.weights import TOTAL, check_weights, fractions, quantise

BY_SIZE = ("proportional", "temperature", "unimax")
"""Mixers that take ``weights`` as the domains' tokens and keep what they make of them."""

ABBREVIATIONS = {"dbl": "dynamic_batch_loading", "sheared_llama": "dynamic_batch_loading"}
_SYMBOLS = {"eta": "step_size"}


def simulate(
    name: str,
    weights: Mapping[str, float],
    table: Sequence[LossLine],
    *,
    initial: Mapping[str, float] | None = None,
    targets: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Feed a mixer with a loss table.

    After each update the weights are rounded to integers as in a run. A loss that is not a finite number leaves the
    weights as they are, except under mixers that take a domain which was not measured (doremi, odm).

    Args:
        name: one of :data:`rewarm.mixing.mixers.MIXERS`, or of :data:`BY_SIZE`.
        weights: start weights by domain, any scale; under :data:`BY_SIZE` the domains' tokens.
        table: one line per update.
        initial: losses before training (velocitune); None takes the first line.
        targets: losses to reach (velocitune, dynamic_batch_loading), or the reference model's (doremi). Like
            ``initial`` they may hold domains of the table that have no weight, as old ones that are only evaluated.
        settings: the mixer's own, by name.

    Returns:
        One ``{"step": int, "weights": {domain: fraction}}`` per line, with what else the mixer has to show.

    Raises:
        UserError: naming the mixer, setting, domain or line that does not fit.
    """
    names = list(weights)
    check_weights(list(weights.values()), names)
    evaluated = {domain for line in table for domain in line.losses}
    initial, targets = (
        None if given is None else {n: loss for n, loss in given.items() if n in names or n not in evaluated}
        for given in (initial, targets)
    )
    mixer = _make(
        name, names, np.array(list(weights.values()), dtype=np.float64), initial, targets, dict(settings or {})
    )
    results, before = [], 0
    for line in table:
        position = line.step if line.tokens is None else line.tokens
        results.append(_update(mixer, line, max(0, position - before)))
        before = position
    return results


def _update(mixer: Mixer, line: LossLine, trained: int) -> dict[str, Any]:
    missing = [name for name in mixer.names if name not in line.losses]
    if missing:
        raise UserError(
            f"{line.where} has no loss for domain {missing[0]!r}, which has a weight",
            fix="give a loss for every domain, or null where it was not measured",
        )
    losses = np.array([line.losses[name] for name in mixer.names], dtype=np.float64)
    bad = [name for name, loss in zip(mixer.names, losses.tolist(), strict=True) if not np.isfinite(loss)]
    if bad and mixer.name not in ("doremi", "odm", "static"):
        mixer.note = f"weights kept: the loss of {bad[0]} is not a finite number"
    else:
        mixer.update(_observation(mixer, line, losses, trained))
        mixer.adopt(fractions(quantise(mixer.weights)))
    weights = (quantise(mixer.weights) / TOTAL).tolist()
    result = {"step": line.step, "weights": dict(zip(mixer.names, weights, strict=True)), **mixer.details()}
    return result | ({"note": mixer.note} if mixer.note else {})


def _observation(mixer: Mixer, line: LossLine, losses: np.ndarray, trained: int) -> Observation:
    """The observation of a line; gradients and probes stand in fields of their own, by domain.

    What was trained on since the line before, in tokens or else in steps, is taken to be shared by the weights.
    """
    extra: dict[str, np.ndarray] = {}
    for field in mixer.needs:
        if field in ("losses", "training_losses"):
            continue
        if field == "training_counts":
            extra[field] = mixer.weights * trained
            continue
        if field not in line.rest:
            raise UserError(
                f"mixer {mixer.name} needs {field}, which {line.where} does not have",
                fix=f"add {_shape(field)} to every line",
            )
        extra[field] = _array(line.rest[field], mixer.names, f"{field} of {line.where}")
    return Observation(line.step, losses=losses, training_losses=losses, **extra)


def _shape(field: str) -> str:
    if field.startswith("probe"):
        return f'"{field}": [{{domain: number}}, ...], one for each probe,'
    inner = "{domain: number}" if field == "gradient_products" else "number"
    return f'"{field}": {{domain: {inner}}}'


def _array(value: Any, names: Sequence[str], what: str) -> np.ndarray:
    if isinstance(value, list):
        return np.stack([by_domain(row, names, what) for row in value])
    if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
        return np.stack([by_domain(value.get(name, {}), names, what) for name in names])
    if isinstance(value, dict):
        return by_domain(value, names, what)
    raise UserError(f"{what} is {value!r}, not numbers by domain")


def _make(
    name: str,
    names: list[str],
    weights: np.ndarray,
    initial: Mapping[str, float] | None,
    targets: Mapping[str, float] | None,
    settings: dict[str, Any],
) -> Mixer:
    name = ABBREVIATIONS.get(name, name)
    if name in BY_SIZE:
        return StaticMixer(names, _by_size(name, weights, settings))
    if name not in MIXERS:
        known = [*MIXERS, *BY_SIZE]
        guess = nearest(name, known)
        raise UserError(
            f"there is no mixer {name!r}: {', '.join(known)}", fix=f"did you mean {guess!r}?" if guess else None
        )
    accepted = inspect.signature(MIXERS[name].__init__).parameters
    arguments = _numbers(
        name, settings, [key for key, p in accepted.items() if p.kind is p.KEYWORD_ONLY], "graph" in accepted
    )
    if "graph" in accepted:
        arguments["graph"] = graph_matrix(settings.get("graph", {}), names)
    for parameter in ("targets", "reference"):
        if parameter in accepted:
            if targets is None:
                raise UserError(f"mixer {name} needs --targets, a loss for every domain")
            arguments[parameter] = by_domain(targets, names, "--targets")
    if "initial" in accepted and initial is not None:
        arguments["initial"] = by_domain(initial, names, "--initial")
    return MIXERS[name](names, weights, **arguments)


def _by_size(name: str, tokens: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    if not (tokens > 0).all():
        raise UserError(f"mixer {name} takes --weights as the domains' tokens, which must be positive")
    if name == "temperature":
        given = _numbers(name, settings, ["temperature"], False)
        return temperature_weights(tokens, given.get("temperature", 5.0))
    if name == "unimax":
        given = _numbers(name, settings, ["max_epochs", "total_tokens"], False)
        if "total_tokens" not in given:
            raise UserError("mixer unimax needs --set total_tokens=NUMBER, what the stage trains on")
        return unimax_weights(tokens, given["total_tokens"], given.get("max_epochs", 4.0))
    _numbers(name, settings, [], False)
    return tokens


def _numbers(name: str, settings: Mapping[str, Any], known: list[str], has_graph: bool) -> dict[str, Any]:
    """The settings that are numbers, by their full names, each checked."""
    numbers: dict[str, Any] = {}
    for key, value in settings.items():
        key = _SYMBOLS.get(key, key)
        if has_graph and key == "graph":
            continue
        if key not in known:
            guess = nearest(key, known)
            raise UserError(
                f"mixer {name} has no setting {key!r}; it has {', '.join(known) or 'none'}",
                fix=f"did you mean {guess!r}?" if guess else None,
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value < 0:
            raise UserError(f"{key}={value!r} of mixer {name} must be a finite number that is not negative")
        numbers[key] = value
    return numbers

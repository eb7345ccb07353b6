"""What a mixer would do on a table of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from rewarm.config.registry import MIXERS, Method
from rewarm.config.section import Section, is_duration, parse_duration
from rewarm.errors import UserError, nearest
from rewarm.mixing.loss_table import LossLine
from rewarm.mixing.mixers.base import Mixer, MixerContext, Observation, by_domain
from rewarm.mixing.weights import TOTAL, check_weights, fractions, quantise

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
        name: a registered mixer.
        weights: start weights by domain, any scale; the domains' tokens for a mixer that computes its weights.
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
    if bad and not mixer.takes_missing_losses:
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
    method = MIXERS[ABBREVIATIONS.get(name, name)]
    given = {_SYMBOLS.get(key, key): value for key, value in settings.items()}
    batch_size = _number(method, "batch_size", given.pop("batch_size", 64))
    total_tokens = given.pop("total_tokens", None)
    section = _section(method, given, targets, names)
    if not method.target.takes_weights:
        weights = _start(method, section, dict(zip(names, weights.tolist(), strict=True)), total_tokens)
    context = MixerContext(
        names,
        weights,
        steps=lambda text: int(parse_duration(text)[0]),
        batch_size=int(batch_size),
        initial_losses=None if initial is None else by_domain(initial, names, "--initial"),
    )
    mixer: Mixer = method.target.build_for_table(context, section)
    return mixer


def _start(method: Method[Any], section: Section | None, tokens: dict[str, float], total: Any) -> np.ndarray:
    """The weights of a mixer that computes them, from ``--weights`` as the domains' tokens."""
    if not all(size > 0 for size in tokens.values()):
        raise UserError(f"mixer {method.name} takes --weights as the domains' tokens, which must be positive")
    if total is None and method.name == "unimax":
        raise UserError("mixer unimax needs --set total_tokens=NUMBER, what the stage trains on")
    budget = None if total is None else _number(method, "total_tokens", total)
    return np.array(list(method.target.start(section, None, tokens, budget).values()), dtype=np.float64)


def _section(
    method: Method[Any], given: dict[str, Any], targets: Mapping[str, float] | None, names: list[str]
) -> Section | None:
    """The mixer's section from ``--set`` and ``--targets``. A duration may be given as a number of steps."""
    fields = {} if method.settings is None else method.settings.model_fields
    for name, value in given.items():
        if name not in fields:
            guess = nearest(name, list(fields))
            raise UserError(
                f"mixer {method.name} has no setting {name!r}; it has {', '.join(fields) or 'none'}",
                fix=f"did you mean {guess!r}?" if guess else None,
            )
        if is_duration(fields[name]) and isinstance(value, int):
            given[name] = f"{_number(method, name, value)} steps"
    for name in {"targets", "reference"} & set(fields):
        if targets is None:
            raise UserError(f"mixer {method.name} needs --targets, a loss for every domain")
        losses = by_domain(targets, names, "--targets").tolist()
        given[name] = dict(zip(names, losses, strict=True))
    if method.settings is None:
        return None
    try:
        return method.settings.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"{name}={problem['input']!r} of mixer {method.name}: {message}") from error


def _number(method: Method[Any], name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value < 0:
        raise UserError(f"{name}={value!r} of mixer {method.name} must be a finite number that is not negative")
    return value

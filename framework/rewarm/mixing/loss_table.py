"""Losses by step from a JSON-lines file: written by hand for a simulation, or recorded by a run's evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarm.errors import UserError


@dataclass(frozen=True, slots=True)
class LossLine:
    """One line of a loss table."""

    where: str
    """``file:line``, for messages."""
    step: int
    losses: dict[str, float]
    """Nats per token by domain; NaN where it was not measured."""
    tokens: int | None
    """Tokens trained so far; None where the line does not say."""
    rest: Mapping[str, Any]
    """The whole line."""


def read_loss_table(path: str | Path) -> list[LossLine]:
    """Read ``{"step": s, "loss": {domain: nats}}`` lines, or the lines of a run's ``evaluation.jsonl``.

    Raises:
        UserError: if the file cannot be read, is empty, or a line is neither, naming ``file:line``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the losses {path}: {error.strerror}", fix="check the path") from error
    lines = [_parse(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no losses", fix='write one {"step": s, "loss": {domain: nats}} a line')
    return lines


def _parse(line: str, where: str) -> LossLine:
    try:
        value = json.loads(line)
        if "loss" in value:
            losses = dict(value["loss"])
        else:
            losses = {name: domain["loss"] for name, domain in value["domains"].items()}
        numbers = {str(name): math.nan if loss is None else float(loss) for name, loss in losses.items()}
        tokens = value.get("tokens")
        return LossLine(where, int(value["step"]), numbers, None if tokens is None else int(tokens), value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where} is no line of a loss table ({type(error).__name__}: {error})",
            fix='write {"step": s, "loss": {domain: nats}}',
        ) from error

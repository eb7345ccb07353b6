"""The base of every configuration section: unknown keys are refused, every field carries its own documentation."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings. Field docstrings are the reference: each gives the unit and the effect."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


_DURATION = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(steps?|tokens?|%)\s*$")


def parse_duration(text: str) -> tuple[float, str]:
    """Split ``"200 steps"``, ``"1e9 tokens"`` or ``"5%"`` into its number and its unit.

    Returns:
        The number, and one of ``"steps"``, ``"tokens"``, ``"%"``.

    Raises:
        ValueError: if the text is none of the three.
    """
    match = _DURATION.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write '200 steps', '1e9 tokens' or '5%'")
    unit = match.group(2)
    return float(match.group(1).replace("_", "")), unit if unit == "%" else unit.rstrip("s") + "s"


def _check_duration(text: str) -> str:
    parse_duration(text)
    return text


def resolve_duration(text: str, *, tokens_per_step: int, total_tokens: int | None = None) -> int:
    """A duration in tokens, rounded to a whole number of steps (at least one step unless the number is 0).

    Args:
        text: a duration.
        tokens_per_step: target tokens that one step trains on, ``global_batch_size * sequence_length``.
        total_tokens: what ``%`` is taken of; None where a percentage means nothing.
    """
    number, unit = parse_duration(text)
    if unit == "%":
        if total_tokens is None:
            raise ValueError(f"{text!r}: a percentage means nothing here; write steps or tokens")
        number = number / 100 * total_tokens
    elif unit == "steps":
        number = number * tokens_per_step
    if number == 0:
        return 0
    return max(1, round(number / tokens_per_step)) * tokens_per_step


Duration = Annotated[str, AfterValidator(_check_duration)]
"""A length of training: ``"200 steps"``, ``"1e9 tokens"`` or ``"5%"`` of the run."""

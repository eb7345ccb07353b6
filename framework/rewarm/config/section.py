"""The base of every configuration section: unknown keys are refused, every field carries its own documentation."""

from __future__ import annotations

import math
import re
import typing
from types import NoneType, UnionType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

MOST_TOKENS = 2**62
"""Longest length of training that is counted; sample indices and tokens are signed 64-bit integers."""


class Section(BaseModel):
    """A group of settings. Field docstrings are the reference: each gives the unit and the effect."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _check_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Null where it is no value of the setting means the default; true and false are no numbers."""
        field = cls.model_fields[info.field_name or ""]
        kinds = alternatives(field.annotation)
        if value is None and not field.is_required() and NoneType not in kinds:
            return field.get_default(call_default_factory=True)
        numbers = [value]
        if isinstance(value, dict) and any(typing.get_args(kind)[-1:] == (float,) for kind in kinds):
            numbers = list(value.values())
        if any(isinstance(number, bool) for number in numbers) and bool not in kinds:
            raise ValueError("true and false are neither numbers nor text; text of that name stands in quotes")
        return value


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; an annotation that is none is its only member."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def ignored(setting: str, by: str, value: Any = None) -> ValueError:
    """What is raised for a setting that another one leaves without effect.

    Args:
        setting: its dotted name.
        by: the other one and its value, as ``a.b=c``.
        value: of the setting, where it helps to see it.
    """
    shown = setting if value is None else f"{setting}={value}"
    return ValueError(
        f"{shown} is ignored by {by}: remove one of the two ({setting}=null on the command line takes it back)"
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
    number, unit = float(match.group(1).replace("_", "")), match.group(2)
    if not number < MOST_TOKENS:
        raise ValueError(f"{text!r} is longer than any training: the most is {MOST_TOKENS:.3g}")
    return number, unit if unit == "%" else unit.rstrip("s") + "s"


def _check_duration(text: str) -> str:
    parse_duration(text)
    return text


def _needs_unit(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        shown = f"{value:g}" if math.isfinite(value) and value >= 0 else "100"
        raise ValueError(f"a length of training needs its unit: write '{shown} steps', '{shown} tokens' or '5%'")
    return value


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


Duration = Annotated[str, BeforeValidator(_needs_unit), AfterValidator(_check_duration)]
"""A length of training: ``"200 steps"``, ``"1e9 tokens"`` or ``"5%"`` of the run."""


def is_duration(field: FieldInfo) -> bool:
    """True if a setting is a duration."""
    return any(isinstance(part, AfterValidator) and part.func is _check_duration for part in field.metadata)


def check_shares(weights: dict[str, float], where: str) -> None:
    """Refuse weights by domain that are no mixture; ``where`` names the setting in the message."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight of domain {name!r} in {where} is {weight}: it must be finite and not negative")
    if sum(weights.values()) <= 0:
        raise ValueError(f"{where} sum to 0: give at least one domain a positive weight")

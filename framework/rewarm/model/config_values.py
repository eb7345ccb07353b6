"""Typed access to a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rewarm.errors import UserError
from rewarm.model.config_keys import read_by_transformers


class Values:
    """The values of a config.json, with messages that name the key and the value.

    What is not supported is collected, so that :meth:`check` can name all of it at once; a value that is not even of
    the right kind is refused where it is read.

    Args:
        values: parsed.
        source: names them in messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source
        self._problems: dict[str, str] = {}

    def get(self, key: str) -> Any:
        """The value of a key, None without one."""
        return self.values.get(key)

    def refusal(self, key: str, what: str, fix: str | None = None) -> UserError:
        """An error about one key."""
        return UserError(f"{self.source}: {key} {what}", fix=fix)

    def unsupported(self, key: str, reason: str, value: Any = None) -> None:
        """Remember that what a key asks for is not computed here.

        Args:
            key: of the file, or one that it leaves out.
            reason: of the refusal.
            value: what transformers takes; None means what the file says.
        """
        self._problems.setdefault(key, f"{key} = {shown(self.get(key) if value is None else value)} ({reason})")

    def check(self, family: str) -> None:
        """Refuse what was found to be unsupported.

        Raises:
            UserError: naming every key and its value.
        """
        if not self._problems:
            return
        raise UserError(
            f"{self.source} asks for what is not supported: {', '.join(self._problems.values())}",
            fix=self._advice(family),
        )

    def _advice(self, family: str) -> str:
        if "auto_map" in self._problems:
            return (
                "if the model computes what transformers' own class does, remove auto_map from config.json; else set "
                "engine=deepspeed, which runs its code with deepspeed.trust_remote_code=true"
            )
        known = read_by_transformers(family) | {"rope_theta", "rope_scaling", "rope_parameters"}
        if self._problems.keys() <= known:
            return "set engine=deepspeed, which runs whatever transformers does; or continue a model without it"
        if self._problems.keys() & known:
            return "continue a model without it"
        return (
            f"transformers' {family} class passes over it: if the model was trained without it, remove it from "
            "config.json; else continue another model"
        )

    def count(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number.

        Raises:
            UserError: if it is something else, too small, or missing without a default.
        """
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.refusal(key, "is missing", "download the folder again")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refusal(key, f"= {shown(value)} is not a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number.

        Raises:
            UserError: if it is something else.
        """
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refusal(key, f"= {shown(value)} is not a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; missing is false.

        Raises:
            UserError: if it is something else.
        """
        value = self.get(key)
        if value not in (None, True, False) or type(value) is int:
            raise self.refusal(key, f"= {shown(value)} is not true or false")
        return bool(value)


def shown(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."

"""Domains, mixture and replay."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rewarm.config.section import Section


class DomainConfig(Section):
    """One named token source. A plain string in YAML is its path."""

    path: str
    """Folder made by ``rewarm data build`` (train.bin/.idx, held_out.bin/.idx), or the prefix of an existing
    Megatron .bin/.idx pair."""
    held_out: str | None = None
    """Prefix of a .bin/.idx pair to evaluate on; null means the folder's own held-out split, or, for a bare
    pair, its last documents (see held_out_fraction)."""
    held_out_fraction: float = Field(default=0.01, gt=0, lt=1)
    """Share of the tokens of a bare .bin/.idx pair that is held out, taken as whole documents from its end.
    Ignored, and refused, where a held-out split exists."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Most passes over the domain in this run; a stage that would need more is refused before it starts.
    Null means no limit."""


class MixtureConfig(Section):
    """How the new domains share the batch."""

    mixer: Literal["static", "proportional"] = "static"
    """static: the given weights. proportional: weights in proportion to each domain's tokens."""
    weights: dict[str, float] | None = None
    """Weight of each domain under ``static``, any positive scale; null means equal weights."""

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        for name, weight in (weights or {}).items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weight of domain {name!r} is {weight}: it must be finite and not negative")
        if weights is not None and sum(weights.values()) <= 0:
            raise ValueError("mixture.weights sum to 0: give at least one domain a positive weight")
        return weights

    @model_validator(mode="after")
    def _check_ignored(self) -> MixtureConfig:
        if self.mixer != "static" and self.weights is not None:
            raise ValueError(f"mixture.weights is ignored by mixture.mixer={self.mixer}: remove one of the two")
        return self


class ReplayConfig(Section):
    """Old domains fed back, so that what the model knows is kept."""

    fraction: float = Field(0.0, ge=0, lt=1)
    """Share of all sampled windows that comes from the lineage's domains; it replaces new tokens, so the cost
    of the run does not change (Ibrahim et al. 2024)."""
    domains: dict[str, float] | None = None
    """Which domains of the lineage and in which proportion; null means all, by the tokens each was trained on."""
    paths: dict[str, str] = Field(default_factory=dict)
    """New place of a lineage domain whose files moved; the content must be the same."""

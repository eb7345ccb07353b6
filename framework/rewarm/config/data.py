"""The data of a stage: its domains; how they are mixed stands in :mod:`rewarm.config.mixture`."""

from __future__ import annotations

from pydantic import Field

from rewarm.config.mixture import MixtureConfig, ReplayConfig
from rewarm.config.paths import PathText
from rewarm.config.section import Section

__all__ = ["DomainConfig", "MixtureConfig", "ReplayConfig"]


class DomainConfig(Section):
    """One named token source. A plain string in YAML is its path."""

    path: PathText
    """Folder made by ``rewarm data build`` (train.bin/.idx, held_out.bin/.idx), or the prefix of an existing
    Megatron .bin/.idx pair."""
    held_out: PathText | None = None
    """Prefix of a .bin/.idx pair to evaluate on; null means the folder's own held-out split, or, for a bare
    pair, its last documents (see held_out_fraction)."""
    held_out_fraction: float = Field(default=0.01, gt=0, lt=1)
    """Share of the tokens of a bare .bin/.idx pair that is held out, taken as whole documents from its end.
    Ignored, and refused, where a held-out split exists."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Most passes over the domain in this run; a stage that would need more is refused before it starts.
    Null means no limit."""

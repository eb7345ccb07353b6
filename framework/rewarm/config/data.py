"""The data of a stage: its domains; how they are mixed stands in :mod:`rewarm.config.mixture`."""

from __future__ import annotations

from pydantic import Field

from rewarm.config.mixture import MixtureConfig, ReplayConfig
from rewarm.config.paths import PathText, expand_path
from rewarm.config.section import Section
from rewarm.errors import UserError

__all__ = ["DomainConfig", "MixtureConfig", "ReplayConfig", "domain_of_option"]


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


def domain_of_option(name: str, path: str) -> DomainConfig:
    """A domain as an option ``NAME=PATH`` gives it: a shell leaves ``~`` behind the sign as it is.

    Raises:
        UserError: if the path names a variable or a user that is not known.
    """
    try:
        return DomainConfig.model_construct(path=expand_path(path))
    except ValueError as error:
        raise UserError(f"{name}={path}: {error}", fix="write the path in full") from error

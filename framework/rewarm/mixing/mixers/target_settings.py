"""Losses that domains should reach: given in place, or in a file that ``rewarm mixture targets`` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from rewarm.config.json_text import parse_json
from rewarm.config.paths import PathText
from rewarm.config.section import Section
from rewarm.errors import UserError
from rewarm.mixing.mixers.base import by_domain


class TargetSettings(Section):
    """What the mixers that have a target for each domain have in common."""

    targets: dict[str, float] | PathText
    """Loss that each new domain should reach, in nats per token; or the file that ``rewarm mixture targets`` wrote."""

    def resolved(self, names: Sequence[str]) -> Self:
        """The section with a file of targets replaced by what it says of the new domains.

        Raises:
            UserError: as :func:`load_targets`.
        """
        return self.model_copy(update={"targets": load_targets(self.targets, names)})

    def by_domain(self, names: Sequence[str], setting: str) -> np.ndarray:
        """The targets in the order of the domains, float64 [K]; ``setting`` names them in messages."""
        return by_domain(load_targets(self.targets, names), names, setting)


def load_targets(targets: Mapping[str, float] | str, names: Sequence[str]) -> dict[str, float]:
    """Targets given in place, or read from the file that ``rewarm mixture targets`` wrote.

    A file may hold more domains than the stage weighs, as the old ones that its pilot evaluated too; what is given in
    place is meant as it stands.

    Args:
        targets: as configured.
        names: the new domains.

    Raises:
        UserError: if the file cannot be read or holds no targets.
    """
    if not isinstance(targets, str):
        return dict(targets)
    try:
        value = parse_json(Path(targets).read_text(encoding="utf-8-sig"))["targets"]
        found = {str(name): float(loss) for name, loss in value.items()}
        return {name: found[name] for name in names if name in found}
    except OSError as error:
        raise UserError(
            f"cannot read the targets {targets}: {error.strerror}", fix="make them with: rewarm mixture targets"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{targets} holds no targets: {error}",
            fix='write {"targets": {"domain": loss}}, or run: rewarm mixture targets',
        ) from error

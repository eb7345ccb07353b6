"""TensorBoard event files, on request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewarm.errors import UserError


def load_writer() -> Any:
    """torch's writer of event files.

    Raises:
        UserError: if the tensorboard package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tracking.tensorboard=true needs the tensorboard package, which is not installed",
            fix="run: pip install tensorboard, or set tracking.tensorboard=false",
        ) from error
    return SummaryWriter


class TensorBoardWriter:
    """Writes scalars under ``<run>/tensorboard``.

    Args:
        folder: where the event files go.
        resumed_step: step of the checkpoint; later points of an earlier try are hidden. None for a new run.

    Raises:
        UserError: if the tensorboard package is missing.
    """

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        self._writer = load_writer()(str(folder), purge_step=None if resumed_step is None else resumed_step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

"""A process's own folder for what DeepSpeed keeps on NVMe.

DeepSpeed names its files by rank alone, so two jobs that were given the same folder overwrite each other's weights, and
nothing is ever removed. No torch in this module.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rewarm.config.deepspeed import DeepSpeedConfig
from rewarm.errors import UserError

_PREFIX = "rewarm-"
_LEAST = 1 << 20
"""Bytes that DeepSpeed moves at once; what takes less stays in memory."""


def check_folder(settings: DeepSpeedConfig) -> None:
    """Refuse an ``nvme_path`` of this machine that cannot be written.

    Raises:
        UserError: naming the folder.
    """
    if settings.nvme_path is None:
        return
    try:
        with tempfile.TemporaryFile(dir=settings.nvme_path):
            pass
    except OSError as error:
        raise UserError(
            f"deepspeed.nvme_path={settings.nvme_path} cannot be written: {error.strerror}",
            fix="name a folder that exists on a fast local disk of every machine",
        ) from error


def check_room(settings: DeepSpeedConfig, shares: Iterable[int], *, ranks: int, parameter_bytes: int) -> None:
    """Refuse an ``nvme_path`` that would be full before the first step ends: DeepSpeed's writer then ends the process.

    Args:
        settings: of the run.
        shares: elements of one rank's part of each parameter.
        ranks: of this machine.
        parameter_bytes: of one element of the model's precision.

    Raises:
        UserError: with both sizes.
    """
    if settings.nvme_path is None:
        return
    sizes = list(shares)
    need = 0
    if settings.offload_optimizer == "nvme":  # fp32 master, two moments and the gradient
        need += sum(16 * size for size in sizes if 4 * size >= _LEAST)
    if settings.offload_parameters == "nvme":
        need += sum(parameter_bytes * size for size in sizes if parameter_bytes * size >= _LEAST)
    disk = os.statvfs(settings.nvme_path)
    free = disk.f_bavail * disk.f_frsize
    if need * ranks > free:
        raise UserError(
            f"deepspeed.nvme_path={settings.nvme_path} has {free / 1e9:.2f} GB free, and what {ranks} ranks of this "
            f"machine offload takes at least {need * ranks / 1e9:.2f} GB",
            fix="free space, name a larger disk, or use more machines",
        )


class SwapFolder:
    """A new folder below ``nvme_path``; those that ended processes left there are removed first.

    Args:
        base: the user's folder.

    Attributes:
        path: the new one.
    """

    def __init__(self, base: str) -> None:
        with open(Path(base) / f".{_PREFIX}guard", "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            for old in Path(base).glob(f"{_PREFIX}*"):
                _remove_if_left(old)
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
            self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def use(self, values: dict[str, Any]) -> dict[str, Any]:
        """The DeepSpeed configuration with this folder in the place of the user's."""
        zero = dict(values["zero_optimization"])
        for key in ("offload_optimizer", "offload_param"):
            if "nvme_path" in (zero.get(key) or {}):
                zero[key] = {**zero[key], "nvme_path": str(self.path)}
        return {**values, "zero_optimization": zero}

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_if_left(folder: Path) -> None:
    """A process that is gone holds no lock."""
    try:
        with open(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return

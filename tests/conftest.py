"""Settings and fixtures of every test."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings

# Processes that tests start and then signal would ignore what this one ignores, as under nohup or in the background.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# A loaded machine must not fail a property; pytest-timeout ends what hangs.
settings.register_profile("rewarm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rewarm")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A scratch folder for direct I/O: the usual temporary folder, or one beside the tests where that is in memory."""
    import os

    from rewarm.errors import UserError
    from rewarm.offload.runtime.nvme import open_scratch

    for parent in (tmp_path, Path(__file__).parent):
        with TemporaryDirectory(dir=parent) as folder:
            try:
                os.close(open_scratch(Path(folder), 4096))
            except UserError:
                continue
            yield Path(folder)
            return
    pytest.skip("no file system with direct I/O")

"""The launchers that others start ranks with: the same configuration, the same numbers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from system.conftest import BASE, Workplace, write_domain

Lines = list[dict[str, Any]]
LAUNCH = Path(__file__).parents[2] / "launch"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.timeout(290)
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_two_ranks_of_another_launcher(tmp_path: Path, script: str, without_timing: Callable[[Lines], Lines]) -> None:
    place = Workplace(tmp_path)
    write_domain(tmp_path / "counting", 1)
    (tmp_path / "base.yaml").write_text(BASE)
    place.run("train", "base.yaml", "name=local", "parallel.data=2", "stop_at=4 steps")
    environment = {**place.environment(), "RANKS": "2", "PORT": free_port(), "REWARM_PYTHON": sys.executable}
    process = subprocess.Popen(
        ["bash", str(LAUNCH / script), "base.yaml", "name=other", "stop_at=4 steps"],
        cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert without_timing(place.lines("other")) == without_timing(place.lines("local"))

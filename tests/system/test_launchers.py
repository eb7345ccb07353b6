"""The launchers that others start ranks with: the same configuration, the same numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE
from rewarm.launch.local import free_port
from system.conftest import BASE, Workplace, write_domain

Lines = list[dict[str, Any]]
LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace in which each engine has trained four steps on two ranks of rewarm's own launcher."""
    place = Workplace(tmp_path_factory.mktemp("launchers"))
    write_domain(place.folder / "counting", 1)
    (place.folder / "base.yaml").write_text(BASE)
    # Two names of one machine stand for two machines.
    (place.folder / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    for engine in ("megatron", "deepspeed"):
        place.run("train", "base.yaml", f"name={engine}", f"engine={engine}", "parallel.data=2", "stop_at=4 steps")
    return place


CASES = {
    "torchrun": ("torchrun.sh", "megatron", [{"RANKS": "2"}]),
    "deepspeed": ("deepspeed.sh", "deepspeed", [{"RANKS": "2"}]),
    "deepspeed with a hostfile": (
        "deepspeed.sh",
        "deepspeed",
        [{"HOSTFILE": "hosts", "HEAD": "127.0.0.1", "NODE": node} for node in "01"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_of_another_launcher(place: Workplace, case: str, without_timing: Callable[[Lines], Lines]) -> None:
    script, engine, machines = CASES[case]
    name, port = case.replace(" ", "-") + "-launcher", str(free_port())
    started = [
        subprocess.Popen(
            ["bash", str(LAUNCH / script), "base.yaml", f"name={name}", f"engine={engine}", "stop_at=4 steps"],
            cwd=place.folder, env={**place.environment(), **machine, "PORT": port, "REWARM_PYTHON": sys.executable},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )
        for machine in machines
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in started] == [0] * len(started), outputs
    assert without_timing(place.lines(name)) == without_timing(place.lines(engine))

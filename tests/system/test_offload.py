"""Runs whose optimizer state is elsewhere, through the command line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from patience import PATIENCE
from rewarm.cli.offload import app
from rewarm.offload.profile import Profile
from system.conftest import Workplace
from system.test_resume import kill_after_line

Lines = list[dict[str, Any]]
SMALL = "offload.subgroup_size=4096"


def test_killed_with_its_state_on_a_drive_and_resumed_elsewhere_is_the_unbroken_plain_run(
    unbroken: Workplace, workplace: Workplace, without_timing: Callable[[Lines], Lines], disk: Path
) -> None:
    step = random.randint(4, 10)
    print(f"killed after step {step}")
    kill_after_line(workplace, step, "offload.mode=nvme", f"offload.nvme_paths=[{disk}]", SMALL)
    assert not list(disk.iterdir())  # nothing is left behind, and nothing stale could be trusted
    # Another placement, then none; a checkpoint is that of the plain optimizer.
    workplace.run("train", "continue.yaml", "offload.mode=deep_optimizer_states", SMALL, "stop_at=11 steps")
    workplace.run("train", "continue.yaml")
    assert without_timing(workplace.lines("continue")) == without_timing(unbroken.lines("continue"))
    assert workplace.lines("continue", "evaluation.jsonl") == unbroken.lines("continue", "evaluation.jsonl")
    log = (workplace.folder / "runs" / "continue" / "logs" / "rank-0.log").read_text()
    for routes in ("100% nvme_cpu", "50% streamed, 50% cpu"):
        assert routes in log, log


def files_without_names(drive: Path) -> list[Path]:
    """Open files of a folder that is otherwise empty, as links that lead to them."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it is not ours, or has ended
            if link.readlink().parent == drive:
                found.append(link)
    return found


def test_a_drive_that_fails_names_its_node_and_the_run_goes_on_without_it(workplace: Workplace, disk: Path) -> None:
    """The status is that of an unfit node, which a chain of jobs avoids from then on."""
    arguments = ["train", "continue.yaml", "parallel.data=2", "evaluation.interval=null"]
    moved = ["duration=3000 steps", "offload.mode=nvme", f"offload.nvme_paths=[{disk}]", SMALL]
    process = workplace.start(*arguments, *moved)
    metrics = workplace.folder / "runs" / "continue" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + PATIENCE
        while not metrics.exists() or metrics.read_text().count("\n") < 4:
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.01)
        file = files_without_names(disk)[0]
        while process.poll() is None and time.monotonic() < deadline:
            if file in files_without_names(disk):
                with contextlib.suppress(OSError):
                    os.truncate(file, 4096)  # again and again: a write may have made it whole, with zeros
            time.sleep(0.005)
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 3, output
    assert "offloaded optimizer state failed: Input/output error" in output and str(disk) in output, output
    assert f"node {socket.gethostname()}" in output and "Traceback" not in output, output
    saved = sorted((workplace.folder / "runs" / "continue" / "checkpoints").glob("step-*"))
    assert saved, "what was saved before is still there"
    assert not list(disk.iterdir())
    step = int(saved[-1].name.removeprefix("step-"))
    workplace.run(*arguments, "duration=3000 steps", f"stop_at={step + 2} steps")
    assert workplace.lines("continue")[-1]["step"] == step + 2


def test_8_bit_moments_survive_a_kill_to_the_bit(
    workplace: Workplace, without_timing: Callable[[Lines], Lines]
) -> None:
    eight = "optimizer.name=adamw_8bit"
    workplace.run("train", "continue.yaml", eight, "name=reference")
    kill_after_line(workplace, random.randint(4, 10), eight, "offload.mode=cpu", SMALL)
    workplace.run("train", "continue.yaml", eight, "offload.mode=streamed", SMALL, "stop_at=11 steps")
    expected = without_timing(workplace.lines("reference"))
    assert without_timing(workplace.lines("continue")) == expected[:11]
    # Other ranks hold other parts of the parameters: the same state, rounded in other blocks.
    output = workplace.run("train", "continue.yaml", eight, "parallel.data=2")
    assert "on another layout 8-bit moments lie in other blocks" in output
    assert workplace.lines("continue")[11]["loss"] == pytest.approx(expected[11]["loss"], rel=1e-4)
    log = (workplace.folder / "runs" / "continue" / "logs" / "rank-0.log").read_text()
    assert "100% cpu, 8-bit moments" in log and "100% streamed, 8-bit moments" in log, log


def test_a_runs_own_file_is_profiled_placed_and_traced(
    trained: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters, their number and the widths are those of the run: 4 + 12 bytes of fp32 per parameter."""
    monkeypatch.chdir(trained.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates = {"1048576": 1e6, "16777216": 1e6}
    Profile("f", "a machine", 1e9, 1e9, 2e9, 8e9, rates, 1e6, rates, 8e9, 2e9, {}, 1.0).save(tmp_path / "p.json")

    def invoke(*arguments: str) -> str:
        return CliRunner().invoke(app, list(arguments), catch_exceptions=False).output

    settings = ["base.yaml", "offload.mode=cpu", "offload.cpu_threads=1", f"offload.profile={tmp_path}/out.json"]
    with pytest.raises(ValueError, match="offload.profile is ignored by offload.mode=cpu"):
        invoke("profile", *settings)
    settings[-1] = "offload.stand_in=0.5"
    output = invoke("profile", *settings, "--seconds", "0.5", "-o", str(tmp_path / "out.json"))
    assert "1 threads" in output and re.search(r"h2d 0\.\d", output)  # at most the link's 0.5 GB/s
    place = json.loads(invoke("place", "base.yaml", "offload.mode=cpu", "--profile", f"{tmp_path}/p.json", "--json"))
    layers = 4 * (32 * 64 + 32 * 32 + 3 * 32 * 64 + 2 * 32)
    parameters = layers + 2 * 300 * 32 + 32
    assert place["seconds"] == pytest.approx(parameters / 1e6, rel=0.05)  # what the CPU's rate says
    trace = ["-o", str(tmp_path / "t.json"), "--profile", f"{tmp_path}/p.json"]
    assert "100% streamed" in invoke("trace", "base.yaml", "offload.mode=streamed", *trace)

"""Ranks that are killed, and stops that come before the first step."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from patience import PATIENCE
from rewarm.resilience.status import read_status
from system.conftest import Workplace

LONG = ("train", "base.yaml", "name=long", "duration=100000 steps", "parallel.data=2")


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in order, once all are there."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        if len(children) == 2:
            return [int(child) for child in children]
        time.sleep(0.01)
    raise AssertionError("the ranks did not start")


def wait_for_lock(workplace: Workplace, process: subprocess.Popen[str]) -> None:
    """Until rank 0 is past Python's own start and has begun to prepare the run."""
    while not (workplace.folder / "runs" / "long" / "lock").exists():
        assert process.poll() is None
        time.sleep(0.01)


def read_until(launcher: subprocess.Popen[str], word: str) -> None:
    assert launcher.stdout is not None
    for line in launcher.stdout:
        if word in line:
            return
    raise AssertionError(f"ended before {word!r}")


def test_a_killed_rank_is_named_and_not_what_the_others_say_of_it(workplace: Workplace) -> None:
    launcher = workplace.start(*LONG)
    try:
        ranks = ranks_of(launcher)
        read_until(launcher, "step 1/")
        os.kill(ranks[1], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=PATIENCE)
    finally:
        launcher.kill()
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "rewarm: rank 1 was killed by SIGKILL" in output
    assert "RuntimeError" not in output
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_before_the_first_step_says_so(workplace: Workplace, number: signal.Signals) -> None:
    launcher = workplace.start(*LONG)
    try:
        wait_for_lock(workplace, launcher)
        launcher.send_signal(number)
        output, _ = launcher.communicate(timeout=PATIENCE)
    finally:
        launcher.kill()
    assert launcher.returncode == 128 + number
    assert output.startswith(f"rewarm: {number.name} received: stopped without saving\n"), output


def test_an_interrupt_of_one_process_before_the_first_step_says_so(workplace: Workplace) -> None:
    process = workplace.start("train", "base.yaml", "name=long", "duration=100000 steps")
    try:
        wait_for_lock(workplace, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert (process.returncode, output) == (130, "rewarm: interrupted\n")


@pytest.mark.parametrize("layout", ["parallel.data=1", "parallel.data=2"])
def test_a_lost_terminal_saves_and_stops(workplace: Workplace, layout: str) -> None:
    """SIGHUP ended a run at once without saving, and what it printed then could not be written any more. One rank of
    the launcher is stopped as well: it saw no signal, and the others waited for it."""
    process = workplace.start(*LONG[:-1], layout)
    try:
        read_until(process, "step 1/")
        if layout == "parallel.data=2":
            os.kill(ranks_of(process)[1], signal.SIGSTOP)
        assert process.stdout is not None
        process.stdout.close()
        process.send_signal(signal.SIGHUP)
        assert process.wait() == 0
    finally:
        process.kill()
    run = workplace.folder / "runs" / "long"
    status = read_status(run)
    assert status is not None and (status.state, status.reason) == ("stopped", "SIGHUP")
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{status.step}"
    assert "output on descriptor 1 is lost" in (run / "logs" / "rank-0.log").read_text()

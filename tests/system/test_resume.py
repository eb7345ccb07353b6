"""A killed run goes on as if nothing had happened; on another layout it sees the same samples."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from patience import PATIENCE
from system.conftest import Workplace

Lines = list[dict[str, Any]]


def kill_after_line(place: Workplace, number: int, *arguments: str, sent: signal.Signals = signal.SIGKILL) -> int:
    """Train and send a signal once the metrics file has that many lines; returns the exit status."""
    process = place.start("train", "continue.yaml", *arguments)
    file = place.folder / "runs" / "continue" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    try:
        while not file.exists() or file.read_text().count("\n") < number:
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.001)
        if sent == signal.SIGKILL:
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)
        return process.wait(PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


@pytest.mark.parametrize("layout", ["", "parallel.data=2"])
def test_killed_at_a_random_step_and_resumed_is_the_unbroken_run(
    unbroken: Workplace, workplace: Workplace, without_timing: Callable[[Lines], Lines], layout: str
) -> None:
    step = random.randint(1, 10)
    print(f"killed after step {step}")
    arguments = [layout] if layout else []
    kill_after_line(workplace, step, *arguments)
    workplace.run("train", "continue.yaml", *arguments)
    expected = unbroken
    if layout:
        expected = workplace
        workplace.run("train", "continue.yaml", "name=reference", layout)
    reference = "reference" if layout else "continue"
    assert [line["step"] for line in workplace.lines("continue")] == list(range(1, 13))
    assert without_timing(workplace.lines("continue")) == without_timing(expected.lines(reference))
    for file in ("evaluation.jsonl", "mixture.jsonl"):
        assert workplace.lines("continue", file) == expected.lines(reference, file)


def test_resume_on_other_layouts_sees_the_same_samples_and_losses(unbroken: Workplace, workplace: Workplace) -> None:
    layout = ["parallel.tensor=2", "parallel.pipeline=2"]
    workplace.run("train", "continue.yaml", *layout, "stop_at=6 steps")
    import shutil

    for name, other in (("two", ["parallel.data=2"]), ("one", [])):
        shutil.copytree(workplace.folder / "runs" / "continue", workplace.folder / "runs" / name)
        (workplace.folder / f"{name}.yaml").write_text(
            (workplace.folder / "continue.yaml").read_text().replace("name: continue", f"name: {name}")
        )
        config = workplace.folder / "runs" / name / "config.yaml"
        config.write_text(config.read_text().replace("name: continue", f"name: {name}"))
        workplace.run("train", f"{name}.yaml", *other)
        lines, expected = workplace.lines(name), unbroken.lines("continue")
        assert [line["sample_hash"] for line in lines] == [line["sample_hash"] for line in expected]
        for line, wanted in zip(lines, expected, strict=True):
            assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-5), line["step"]
            assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], abs=1e-5), line["step"]


@pytest.mark.parametrize("layout", ["", "parallel.data=2"])
def test_sigterm_finishes_the_step_saves_and_exits_cleanly(
    unbroken: Workplace, workplace: Workplace, without_timing: Callable[[Lines], Lines], layout: str
) -> None:
    arguments = [layout] if layout else []
    assert kill_after_line(workplace, 2, *arguments, sent=signal.SIGTERM) == 0
    stopped = workplace.lines("continue")[-1]["step"]
    latest = (workplace.folder / "runs" / "continue" / "checkpoints" / "latest").read_text().strip()
    assert latest == f"step-{stopped}" and stopped < 12
    state = json.loads((workplace.folder / "runs" / "continue" / "checkpoints" / latest / "state.json").read_text())
    assert state["threads"] == [1] * (2 if layout else 1)
    workplace.run("train", "continue.yaml")
    lines, expected = without_timing(workplace.lines("continue")), without_timing(unbroken.lines("continue"))
    assert [line["sample_hash"] for line in lines] == [line["sample_hash"] for line in expected]
    if not layout:
        assert lines == expected


def test_a_damaged_newest_checkpoint_is_stepped_over(
    unbroken: Workplace, workplace: Workplace, without_timing: Callable[[Lines], Lines]
) -> None:
    workplace.run("train", "continue.yaml", "stop_at=6 steps")
    newest = workplace.folder / "runs" / "continue" / "checkpoints" / "step-6" / "model"
    shard = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    output = workplace.run("train", "continue.yaml")
    assert "step-6" in output and "damaged" in output
    assert without_timing(workplace.lines("continue")) == without_timing(unbroken.lines("continue"))

"""Closed-loop weights in real runs: killed, resumed on another rank count, audited."""

from __future__ import annotations

import json
import os
import signal
import time

from rewarm.mixing.weights import TOTAL
from system.conftest import Workplace

VELOCITUNE = ["mixture.mixer=velocitune", "mixture.velocitune.targets={threes: 2.0, sevens: 3.0}"]
LENGTH = ["duration=16 steps", "evaluation.interval=2 steps"]


def kill_after_line(place: Workplace, number: int, *arguments: str) -> None:
    """Train and kill once the metrics file has that many lines."""
    process = place.start("train", *arguments)
    metrics = place.folder / "runs" / "continue" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= number:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)


def test_killed_on_two_ranks_and_resumed_on_one_it_keeps_to_the_log(workplace: Workplace) -> None:
    arguments = ["continue.yaml", *VELOCITUNE, *LENGTH]
    kill_after_line(workplace, 8, *arguments, "parallel.data=2")
    decided = workplace.lines("continue", "mixture.jsonl")
    seen = {line["step"]: line["sample_hash"] for line in workplace.lines("continue")}
    assert len(decided) > 3
    workplace.run("train", *arguments, "parallel.data=1")

    entries = workplace.lines("continue", "mixture.jsonl")
    assert entries[: len(decided)] == decided
    # Evaluations at 0, 2, ..., and 3 steps of 8 samples ahead; the last one within 16 steps is that of step 12.
    assert [entry["sample"] for entry in entries] == [0, *((step + 3) * 8 for step in range(0, 13, 2))]
    assert all(sum(entry["weights"].values()) == TOTAL for entry in entries)
    assert all(abs(entry["weights"]["counting"] - TOTAL // 4) <= 1 for entry in entries)
    assert len({json.dumps(entry["weights"]) for entry in entries}) > 3
    metrics = workplace.lines("continue")
    assert [line["step"] for line in metrics] == list(range(1, 17))
    assert {line["step"]: line["sample_hash"] for line in metrics if line["step"] in seen} == seen
    found = json.loads(workplace.run("mixture", "audit", "runs/continue", "--json"))
    assert (found["steps"], found["compared"], found["different"]) == (16, 16, [])


def test_phases_and_their_plan_are_in_the_log_from_the_start(workplace: Workplace) -> None:
    phases = (
        "[{weights: {threes: 1, sevens: 3}, at: 50%}, {weights: {threes: 0, sevens: 1}, learning_rate_fraction: 0.2}]"
    )
    workplace.run("train", "continue.yaml", "mixture.mixer=phased", f"mixture.phased.phases={phases}")
    entries = workplace.lines("continue", "mixture.jsonl")
    assert [entry["reason"] for entry in entries] == ["start: phased", "phase 0", "phase 1"]
    assert entries[1]["sample"] == 6 * 8
    metrics = workplace.lines("continue")
    peak = max(line["learning_rate"] for line in metrics)
    # Line s is of the step that starts after s - 1 steps.
    first = next(line["step"] - 1 for line in metrics if line["step"] > 2 and line["learning_rate"] <= 0.2 * peak)
    assert entries[2]["sample"] == first * 8
    shares = {line["step"]: line["domains"]["sevens"]["weight"] for line in metrics}
    assert [round(shares[step], 6) for step in (1, 6, 7, first, first + 1)] == [0.375, 0.375, 0.5625, 0.5625, 0.75]

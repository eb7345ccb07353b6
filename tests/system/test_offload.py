"""Runs whose optimizer state is elsewhere, through the command line."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

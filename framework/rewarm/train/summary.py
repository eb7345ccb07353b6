"""What a user reads when a run ends."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rewarm.evaluation.comparison import compare, comparison_table
from rewarm.tracking.metrics import EvaluationLine, read_lines

if TYPE_CHECKING:
    from rewarm.train.run import Run


def print_summary(run: Run) -> None:
    """Print why the run ended, what changed in each domain's held-out loss, and where things lie."""
    from rich.console import Console

    if run.tracker.last_evaluated_step != run.config.total_steps:
        why, again = run.stop_reason, "the same command goes on"
        if why is None:
            why, again = f"stop_at={run.config.stop_at}", "the same command without it goes on"
        print(f"stopped after step {run.step} of {run.config.total_steps} ({why}); {again}")
        return
    lines = cast("list[EvaluationLine]", read_lines(run.folder / "evaluation.jsonl"))
    if len(lines) > 1:
        Console().print(comparison_table(compare(lines, new_domains=set(run.config.data))))
    # Not through rich, which breaks lines at the terminal's width: these are copied.
    print(f"run      {run.folder}")
    print(f"export   {export_command(run.folder)}")


def export_command(folder: Path) -> str:
    """The command that exports a run, as a shell takes it."""
    return shlex.join(["rewarm", "export", str(folder), "--output", str(folder / "huggingface"), "--check"])

"""What a user reads when a run ends."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rewarm.evaluation.comparison import DomainComparison, compare, comparison_table
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
        table = comparison_table(_compare(run, lines))
        console = Console()
        # A table that is cut would lose figures; a terminal that is narrower wraps its lines instead.
        whole = console.measure(table, options=console.options.update(width=1000)).maximum
        console.width = max(console.width, whole)
        console.print(table)
    # Not through rich, which breaks lines at the terminal's width: these are copied.
    print(f"run      {run.folder}")
    print(f"export   {export_command(run.folder)}")


def _compare(run: Run, lines: list[EvaluationLine]) -> list[DomainComparison]:
    lineage, first = run.stage.origin.lineage, lines[0]["domains"]
    known = {domain.fingerprint for domain in lineage.domains()}
    new = {domain.name for domain in run.stage.evaluated if domain.fingerprint not in known}
    learned: dict[str, float | None] = {}
    for domain in run.stage.evaluated:
        before = first[domain.name]["loss"] if domain.name in first else None
        if before is not None:
            measured_on = run.stage.measured_on(domain)
            learned[domain.name] = lineage.loss_when_learned(domain.fingerprint, measured_on, before)
    return compare(lines, new, learned)


def export_command(folder: Path) -> str:
    """The command that exports a run, as a shell takes it."""
    return shlex.join(["rewarm", "export", str(folder), "--output", str(folder / "huggingface"), "--check"])

"""Before and after: what a stage taught the model and what it cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewarm.tracking.metrics import EvaluationLine

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class DomainComparison:
    """One domain's held-out loss at the first and the last evaluation."""

    domain: str
    is_new: bool
    """True for a domain that this stage trains on and the lineage did not."""
    before: float
    """Nats per token."""
    after: float
    """Nats per token."""
    before_bits: float | None
    """Bits per byte; None where the bytes behind the tokens are not known."""
    after_bits: float | None
    """Bits per byte."""

    @property
    def change(self) -> float:
        """Nats per token; negative is better."""
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """``learned 0.512``, ``forgot 0.034``, ``kept`` (changed by less than half a thousandth)."""
        if abs(self.change) < 5e-4:
            return "kept" if not self.is_new else "unchanged"
        return f"learned {-self.change:.3f}" if self.change < 0 else f"forgot {self.change:.3f}"


def compare(first: EvaluationLine, last: EvaluationLine, *, old_domains: Collection[str]) -> list[DomainComparison]:
    """Compare two evaluations of one run, old domains before the new ones.

    Args:
        first: the evaluation before the stage.
        last: the one after it.
        old_domains: domains of the lineage; all others are new. Those without a loss in both lines are left out.
    """
    rows = []
    for name, before in first["domains"].items():
        after = last["domains"].get(name)
        if after is None or before["loss"] is None or after["loss"] is None:
            continue
        bits = (before["bits_per_byte"], after["bits_per_byte"])
        rows.append(DomainComparison(name, name not in old_domains, before["loss"], after["loss"], *bits))
    return sorted(rows, key=lambda row: row.is_new)


def render(rows: Sequence[DomainComparison]) -> Table:
    """The comparison as a table for the terminal."""
    from rich.table import Table

    table = Table(title="Held-out loss before and after", title_justify="left")
    table.add_column("domain")
    table.add_column("")
    for heading in ("nats/token before", "after", "bits/byte before", "after"):
        table.add_column(heading, justify="right")
    table.add_column("change in nats/token")
    for row in rows:
        bits = ["-" if value is None else f"{value:.4f}" for value in (row.before_bits, row.after_bits)]
        kind = "new" if row.is_new else "old"
        style = "green" if row.change <= 5e-4 else "yellow"
        table.add_row(row.domain, kind, f"{row.before:.4f}", f"{row.after:.4f}", *bits, f"[{style}]{row.verdict}[/]")
    return table

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


def compare(lines: Sequence[EvaluationLine], new_domains: Collection[str]) -> list[DomainComparison]:
    """Compare the first evaluation with the last, new domains after the old ones.

    Args:
        lines: evaluation lines of one run, in order.
        new_domains: domains that the lineage had not trained on.

    Raises:
        ValueError: with fewer than two lines.
    """
    if len(lines) < 2:
        raise ValueError(f"{len(lines)} evaluation lines; a comparison needs the first and the last")
    first, last = lines[0]["domains"], lines[-1]["domains"]
    rows = []
    for name in first:
        before, after = first[name], last.get(name)
        if after is None or before["loss"] is None or after["loss"] is None:
            continue
        bits = (before["bits_per_byte"], after["bits_per_byte"])
        rows.append(DomainComparison(name, name in new_domains, before["loss"], after["loss"], *bits))
    return sorted(rows, key=lambda row: row.is_new)


def comparison_table(rows: Sequence[DomainComparison]) -> Table:
    """The comparison as a table for the terminal."""
    from rich.table import Table

    table = Table(title="Held-out loss before and after", title_justify="left")
    table.add_column("domain", no_wrap=True)
    table.add_column("")
    for heading in ("nats/token\nbefore", "\nafter", "bits/byte\nbefore", "\nafter"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("change in\nnats/token", no_wrap=True)
    for row in rows:
        bits = ["-" if value is None else f"{value:.4f}" for value in (row.before_bits, row.after_bits)]
        kind = "new" if row.is_new else "old"
        style = "green" if row.change <= 5e-4 else "yellow"
        table.add_row(row.domain, kind, f"{row.before:.4f}", f"{row.after:.4f}", *bits, f"[{style}]{row.verdict}[/]")
    return table

"""Before and after: what a stage taught the model and what it cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    learned: float | None = None
    """Nats per token when the lineage had just learned it, at its best; None where that is not known."""

    @property
    def change(self) -> float:
        """Nats per token; negative is better."""
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """``learned 0.512``, ``forgot 0.034``, ``kept`` (changed by less than half a thousandth)."""
        return _verdict(self.change, "unchanged" if self.is_new else "kept")

    @property
    def since_learned(self) -> str:
        """The same against :attr:`learned`, which no stage before this one can hide; ``-`` for a new domain."""
        if self.is_new:
            return "-"
        return "not known" if self.learned is None else _verdict(self.after - self.learned, "kept")


def _verdict(change: float, unchanged: str) -> str:
    if abs(change) < 5e-4:
        return unchanged
    return f"learned {-change:.3f}" if change < 0 else f"forgot {change:.3f}"


def compare(
    lines: Sequence[EvaluationLine], new_domains: Collection[str], learned: Mapping[str, float | None] | None = None
) -> list[DomainComparison]:
    """Compare the first evaluation with the last, new domains after the old ones.

    Args:
        lines: evaluation lines of one run, in order.
        new_domains: domains that the lineage had not trained on.
        learned: loss of the old ones when they had just been learned, nats per token, where it is known.

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
        known = (learned or {}).get(name)
        rows.append(DomainComparison(name, name in new_domains, before["loss"], after["loss"], *bits, known))
    return sorted(rows, key=lambda row: row.is_new)


def comparison_table(rows: Sequence[DomainComparison]) -> Table:
    """The comparison as a table for the terminal: 80 columns where the names of the domains have at most 8 letters."""
    from rich import box
    from rich.table import Table

    title = "Held-out loss before and after; changes in nats per token"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("domain", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in ("nats\nbefore", "\nafter", "bits/B\nbefore", "\nafter"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("change in\nthis stage", "since it\nwas learned"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        bits = ["-" if value is None else f"{value:.4f}" for value in (row.before_bits, row.after_bits)]
        kind = "new" if row.is_new else "old"
        style = "green" if row.change <= 5e-4 else "yellow"
        losses = [f"{row.before:.4f}", f"{row.after:.4f}"]
        table.add_row(row.domain, kind, *losses, *bits, f"[{style}]{row.verdict}[/]", row.since_learned)
    return table

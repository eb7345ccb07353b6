"""The table at the end of a stage."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rewarm.evaluation.comparison import compare, comparison_table
from rewarm.tracking.metrics import EvaluationLine


def line(step: int, **losses: tuple[float | None, float | None]) -> EvaluationLine:
    domains = {name: {"loss": loss, "bits_per_byte": bits} for name, (loss, bits) in losses.items()}
    return {"step": step, "tokens": step * 10, "domains": domains}  # type: ignore[typeddict-item]


LINES = [
    line(0, python=(5.0, 2.0), english=(2.0, 0.9), notes=(3.0, None), empty=(None, None)),
    line(50, python=(9.0, 9.0), english=(9.0, 9.0), notes=(9.0, 9.0), empty=(None, None)),
    line(100, python=(4.25, 1.7), english=(2.125, 0.95), notes=(3.0001, None), empty=(None, None)),
]


def test_old_domains_come_first_and_only_the_ends_count() -> None:
    rows = compare(LINES, {"python"})
    assert [(row.domain, row.is_new, row.before, row.after) for row in rows] == [
        ("english", False, 2.0, 2.125),
        ("notes", False, 3.0, 3.0001),
        ("python", True, 5.0, 4.25),
    ]
    assert [row.verdict for row in rows] == ["forgot 0.125", "kept", "learned 0.750"]
    assert (rows[2].before_bits, rows[2].after_bits) == (2.0, 1.7)


def test_table_holds_every_figure() -> None:
    text = io.StringIO()
    Console(file=text, width=120).print(comparison_table(compare(LINES, {"python"})))
    for part in ("english", "2.1250", "0.9500", "forgot 0.125", "python", "learned 0.750", "new", "old"):
        assert part in text.getvalue()


def test_what_was_forgotten_since_a_domain_was_learned_stands_beside_the_last_stage() -> None:
    rows = compare(LINES, {"python"}, {"english": 1.75, "notes": None, "python": None})
    assert [row.since_learned for row in rows] == ["forgot 0.375", "not known", "-"]
    assert [row.verdict for row in rows] == ["forgot 0.125", "kept", "learned 0.750"]
    text = io.StringIO()
    Console(file=text, width=120).print(comparison_table(rows))
    assert "forgot 0.125" in text.getvalue() and "forgot 0.375" in text.getvalue() and "not known" in text.getvalue()


def test_one_line_is_refused() -> None:
    with pytest.raises(ValueError, match="first and the last"):
        compare(LINES[:1], set())

"""No test gives up on another process near the time that it takes on an idle machine."""

from __future__ import annotations

import re
from pathlib import Path

from patience import PATIENCE, slowness

TESTS = Path(__file__).parents[1]
SHORT = re.compile(r"(?<![\w.])timeout=\d|monotonic\(\) \+ \d+(?! \*)|\.wait\([1-9]|mark\.timeout")


def test_waits_end_by_patience() -> None:
    own = {Path(__file__), TESTS / "ranks" / "test_harness.py"}
    found = [
        f"{path.relative_to(TESTS)}:{number}: {line.strip()}"
        for path in sorted(TESTS.rglob("*.py"))
        if path not in own
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if SHORT.search(line)
    ]
    assert not found, "use PATIENCE of tests/patience.py:\n" + "\n".join(found)
    assert PATIENCE >= 1800


def test_slowness_is_at_least_one() -> None:
    assert slowness() >= 0.9

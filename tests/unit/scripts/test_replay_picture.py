"""The README's picture shows the figures of the benchmark page."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_picture_is_drawn_from_the_committed_table() -> None:
    spec = importlib.util.spec_from_file_location("replay_picture", ROOT / "scripts" / "replay_picture.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    changes = script.table(script.SOURCE.read_text(encoding="utf-8"))
    picture = script.PICTURE.read_text(encoding="utf-8")
    assert script.draw(changes) == picture
    left = changes["5%"]["English"] / changes["0%"]["English"]
    assert f"leaves {left:.2f} of the forgetting" in picture
    assert f"{left:.2f}" in (ROOT / "README.md").read_text(encoding="utf-8")

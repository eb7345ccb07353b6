"""The generated reference: current, complete, and every setting documented."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewarm.config.load import build
from rewarm.config.reference import reference
from rewarm.config.run import RunConfig

DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "config.md"


def leaves(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path


def test_the_document_is_current() -> None:
    assert DOCUMENT.read_text() == reference(), "run: rewarm config reference > docs/reference/config.md"


def test_every_setting_of_a_resolved_configuration_is_listed() -> None:
    config = build({"name": "a", "data": {"d": "path"}, "model": {}})
    text = reference()
    for path in leaves(config.model_dump()):
        assert f"`{path.replace('data.d.', 'data.<name>.')}`" in text


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert not [row for row in rows if row.replace("\\|", "").split("|")[-2].strip() == ""]


def test_types_bounds_and_defaults_are_spelt_out() -> None:
    text = reference()
    assert "| `batch.sequence_length` | integer > 0 | `256` |" in text
    assert "| `model.head_dim` | integer > 0 \\| null | `null` |" in text
    assert "| `schedule.warmup` | duration | `1%` |" in text
    assert "| `data` | mapping of name to section | required |" in text
    assert "## `mixture.phased.phases.<n>`" in text
    assert f"< {2**63}" in text
    assert RunConfig.model_fields["seed"].description in text

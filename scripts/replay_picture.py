"""Draw docs/images/replay.svg from the committed table "What replay keeps": nothing is measured here.

python scripts/replay_picture.py                 # writes docs/images/replay.svg
python scripts/replay_ablation.py                # made the table: two runs from one checkpoint, 0% and 5% replay
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "docs" / "benchmarks" / "2026-11-21-cpu.md"
PICTURE = ROOT / "docs" / "images" / "replay.svg"
COLORS = {"0%": "#9aa5b1", "5%": "#1f77b4"}
SCALE, ZERO, BAR = 75, 110, 46
"""Pixels per nat; the height of the line at 0; the width of a bar."""


def table(text: str) -> dict[str, dict[str, float]]:
    """Change of held-out loss in nats per token by replay share and domain, of section "What replay keeps"."""
    section = text.split("## What replay keeps", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section, re.M)]
    return {row[0]: {name: float(value) for name, value in zip(rows[0][1:], row[1:], strict=True)} for row in rows[2:]}


def draw(changes: dict[str, dict[str, float]]) -> str:
    """The bars as SVG text: above the line what was forgotten, below it what was learned."""
    domains = list(next(iter(changes.values())))
    left = changes["5%"][domains[0]] / changes["0%"][domains[0]]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 360" font-family="sans-serif" font-size="13">',
        f"<title>5% replay leaves {left:.2f} of the forgetting of 0%</title>",
        '<rect width="640" height="360" fill="#ffffff"/>',
        f'<text x="20" y="26" font-size="16" font-weight="bold">5% replay leaves {left:.2f} of the forgetting, '
        "at the same number of tokens</text>",
        '<text x="20" y="44" fill="#555">change of held-out loss, nats per token; up: forgotten, down: learned</text>',
        f'<line x1="20" x2="620" y1="{ZERO}" y2="{ZERO}" stroke="#333"/>',
    ]
    for column, domain in enumerate(domains):
        start = 70 + 200 * column
        for number, (fraction, change) in enumerate(changes.items()):
            x, height, value = start + number * (BAR + 14), abs(change[domain]) * SCALE, change[domain]
            top, label = (ZERO - height, ZERO - height - 5) if value > 0 else (ZERO, ZERO + height + 15)
            parts += [
                f'<rect x="{x}" y="{top:.1f}" width="{BAR}" height="{height:.1f}" fill="{COLORS[fraction]}"/>',
                f'<text x="{x + BAR / 2:g}" y="{label:.1f}" text-anchor="middle">{value:+.2f}</text>',
            ]
        kind = "old" if column == 0 else "new"
        parts.append(f'<text x="{start + BAR + 7}" y="322" text-anchor="middle">{domain} ({kind})</text>')
    for number, fraction in enumerate(changes):
        parts += [
            f'<rect x="{20 + 110 * number}" y="336" width="12" height="12" fill="{COLORS[fraction]}"/>',
            f'<text x="{38 + 110 * number}" y="347">{fraction} replay</text>',
        ]
    parts.append('<text x="620" y="347" text-anchor="end" fill="#555">quickstart model, one seed, 2026-11-29</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(table(SOURCE.read_text(encoding="utf-8"))), encoding="utf-8")

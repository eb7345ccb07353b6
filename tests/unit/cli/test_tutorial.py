"""The tutorial's stage is one, and its files and links are there; tests/unit/test_documents.py checks its commands."""

from __future__ import annotations

import re
from pathlib import Path

from rewarm.config.load import load

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The lines of the bash blocks, continued ones joined."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_its_files_are_there_and_its_stage_is_whole() -> None:
    lines = "\n".join(commands())
    assert "python scripts/smollm2.py models/SmolLM2-135M" in lines and (ROOT / "scripts" / "smollm2.py").is_file()
    assert "rewarm train configs/tutorial/smollm2.yaml" in lines
    stage = load(ROOT / "configs" / "tutorial" / "smollm2.yaml", [])
    assert stage.parent == "models/SmolLM2-135M" and f"runs/{stage.name}" in lines
    for name, domain in stage.data.items():
        assert f"{name}={domain.path}" in lines and domain.path == f"data/smollm2/{name}"
    assert "data/smollm2/$domain" in lines and "for domain in python english cpp" in lines


def test_its_links_lead_somewhere() -> None:
    for page in ("tutorial.md", "README.md", "guide/models.md", "guide/own-data-and-model.md", "guide/data.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", text):
            place = (ROOT / "docs" / page).parent / target if target else ROOT / "docs" / page
            assert place.exists(), (page, target)
            if anchor and place.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor[1:] in slugs, (page, target, anchor)

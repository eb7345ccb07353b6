"""The tutorial's commands are commands, with options that exist; its stage is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from rewarm.cli.main import app
from rewarm.config.load import load

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The lines of the bash blocks, continued ones joined."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("rewarm ")])
def test_a_command_takes_its_arguments(line: str) -> None:
    command: click.Command = typer.main.get_command(app)
    arguments = shlex.split(line)[1:]
    context = click.Context(command)
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, arguments)
        assert found is not None and name is not None
        command, context = found, click.Context(found, parent=context)
    command.make_context(line, arguments)


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

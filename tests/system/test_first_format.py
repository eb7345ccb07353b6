"""Runs of the first checkpoint format go on, and are parents, as if this version had written them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saved_runs import unpack_runs
from system.conftest import Workplace

MOVED = "replay.paths.counting=counting"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(unpack_runs(tmp_path_factory.mktemp("old")))


@pytest.mark.parametrize(("run", "moved"), [("continue", [MOVED]), ("zero", [])])
def test_a_resume_of_the_first_format_is_the_run_that_went_on(old: Workplace, run: str, moved: list[str]) -> None:
    """The samples to the bit; losses too on the machine that wrote them, and nearly elsewhere."""
    old.run("train", f"{run}.yaml", *moved)
    lines = old.lines(run)
    expected = [json.loads(line) for line in (old.folder / f"expected/{run}.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line, wanted in zip(lines, expected, strict=True):
        assert line["sample_hash"] == wanted["sample_hash"]
        assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], abs=1e-4)
    newest = old.folder / f"runs/{run}/checkpoints/step-8"
    assert [path.name for path in (newest / "random").iterdir()] == ["rank-00000.safetensors"]
    stages = json.loads((newest / "lineage.json").read_text())["stages"]
    assert stages[-1]["tokens"] == 256 and len(stages) == (2 if run == "continue" else 1)
    assert not list(Path(newest).rglob("*.pickle"))

"""A stage that trains on what its parent trained on goes on in it."""

from __future__ import annotations

import json

from system.conftest import Workplace


def sampled(place: Workplace, run: str) -> list[str]:
    """Sample hashes of a run's steps."""
    return [line["sample_hash"] for line in place.lines(run)]


def test_two_stages_see_the_samples_of_one(workplace: Workplace) -> None:
    """Six and six steps on one domain, as two runs, see what twelve steps of one run see; another seed does not."""
    workplace.run("train", "base.yaml", "name=first", "duration=6 steps")
    base = (workplace.folder / "base.yaml").read_text().replace("name: base", "name: second\nparent: runs/first")
    start, end = base.index("model: {"), base.index("duration:")
    (workplace.folder / "second.yaml").write_text(base[:start] + base[end:])
    workplace.run("train", "second.yaml", "duration=6 steps")
    assert sampled(workplace, "first") + sampled(workplace, "second") == sampled(workplace, "base")
    lineage = json.loads((workplace.folder / "runs" / "second" / "lineage.json").read_text())
    assert [stage["domains"][0]["windows"] for stage in lineage["stages"]] == [48, 48]
    workplace.run("train", "second.yaml", "name=other", "seed=5", "duration=6 steps")
    assert not set(sampled(workplace, "other")) & set(sampled(workplace, "base"))

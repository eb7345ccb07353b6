"""A stage that trains on what its parent trained on goes on in it."""

from __future__ import annotations

import json

import yaml

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
    # The warm-up from the parent's last rate, which the child's own files keep.
    last = workplace.lines("first")[-1]["learning_rate"]
    command = ("train", "second.yaml", "name=warm", "duration=6 steps", "schedule.start=parent")
    workplace.run(*command, "stop_at=3 steps")
    (workplace.folder / "runs" / "first").rename(workplace.folder / "runs" / "gone")
    workplace.run(*command)
    rates = [line["learning_rate"] for line in workplace.lines("warm")]
    assert rates[:2] == [(last + 3e-3) / 2, 3e-3] and len(rates) == 6
    assert float(yaml.safe_load((workplace.folder / "runs/warm/config.yaml").read_text())["schedule"]["start"]) == last
    (workplace.folder / "runs" / "gone").rename(workplace.folder / "runs" / "first")
    workplace.run("train", "second.yaml", "name=other", "seed=5", "duration=6 steps")
    assert not set(sampled(workplace, "other")) & set(sampled(workplace, "base"))

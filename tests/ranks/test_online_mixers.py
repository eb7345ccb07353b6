"""Closed-loop weights on the demo's text: killed on two ranks, resumed on another number, ending at the same weight
log; and what each tier of the promise about a resume means for them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ranks.harness import RanksFailed, run_ranks
from ranks.mixture_workers import train_stage
from rewarm.data.demo import DOMAINS, make_demo
from rewarm.mixing.weights import TOTAL
from rewarm.tracking.metrics import TIMING_FIELDS

STAGE = """
name: stage
tokenizer: demo/tokenizer
data: {english: demo/english, python: demo/python, cpp: demo/cpp}
model: {num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, num_key_value_heads: 2}
duration: 26 steps
batch: {sequence_length: 32, global_batch_size: 8, micro_batch_size: 4}
schedule: {peak: 1e-2, warmup: 2 steps}
evaluation: {interval: 2 steps, windows_per_domain: 8, micro_batch_size: 4}
checkpoint: {interval: 14 steps, keep: 2}
tracking: {wandb: {mode: disabled}}
"""
TARGETS = {"targets": {"english": 5.9, "python": 5.0, "cpp": 4.0}}
GRAPH = "{english: {english: 1, python: 0.5}, python: {python: 1, cpp: 0.5}, cpp: {cpp: 1}}"
MIXERS = {
    "velocitune": ["mixture.velocitune.targets=targets.json"],
    "dynamic_batch_loading": ["mixture.dynamic_batch_loading.targets=targets.json"],
    "odm": [],
    "ado": ["mixture.ado.warmup=2 steps"],
    "skill_it": [f"mixture.skill_it.graph={GRAPH}"],
    "aioli": ["mixture.aioli={probes_per_domain: 1, hold: 2}"],
    "pike": [],
    "doge": [],
    "phased": [
        "mixture.phased.phases=[{weights: {english: 0, python: 1, cpp: 1}, at: 13 steps}, "
        "{weights: {english: 1, python: 0, cpp: 3}, loss_below: {english: 6.1}}]"
    ],
}
LAST = 22
"""Step of the last evaluation whose weights take effect: 3 steps later, before the end at 26."""


@dataclass(frozen=True)
class Place:
    """A folder with the demo's domains, in which stages are trained."""

    folder: Path

    def train(self, num_ranks: int, *overrides: str, killed_at: int | None = None) -> None:
        """On so many ranks, to the end or to their death."""
        arguments = (self.folder, "stage.yaml", [*overrides], killed_at)
        if killed_at is None:
            run_ranks(train_stage, num_ranks, *arguments)
            return
        with pytest.raises(RanksFailed, match="ended without a result"):
            run_ranks(train_stage, num_ranks, *arguments)

    def lines(self, run: str, file: str) -> list[dict[str, Any]]:
        """The lines of one of a run's files."""
        return [json.loads(line) for line in (self.folder / "runs" / run / file).read_text().splitlines()]

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """The metrics without what differs between two identical runs."""
        return [
            {key: value for key, value in line.items() if key not in TIMING_FIELDS}
            for line in self.lines(run, "metrics.jsonl")
        ]

    def hashes(self, run: str) -> list[str]:
        """Of every step's samples."""
        return [line["sample_hash"] for line in self.lines(run, "metrics.jsonl")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("online")
    made = make_demo(folder / "demo", vocab_size=512, megabytes=0.4)
    assert tuple(made.domains) == DOMAINS
    (folder / "stage.yaml").write_text(STAGE)
    (folder / "targets.json").write_text(json.dumps(TARGETS))
    return Place(folder)


@pytest.mark.parametrize("mixer", MIXERS)
def test_killed_on_two_ranks_and_resumed_on_one_the_weight_log_is_the_same(place: Place, mixer: str) -> None:
    settings = [f"name={mixer}", f"mixture.mixer={mixer}", *MIXERS[mixer]]
    place.train(2, *settings, killed_at=LAST + 1)
    decided, seen = place.lines(mixer, "mixture.jsonl"), place.hashes(mixer)
    assert len(seen) == LAST + 1
    evaluated = [(step + 3) * 8 for step in range(0, LAST + 1, 2)]
    # The phase that begins after 13 steps is in the log from the start, and the decision for that sample follows it.
    planned = [13 * 8] if mixer == "phased" else []
    assert [entry["sample"] for entry in decided] == [0, *planned, *evaluated]
    assert all(sum(entry["weights"].values()) == TOTAL for entry in decided)
    assert len({json.dumps(entry["weights"]) for entry in decided}) > 2
    if mixer == "aioli":
        assert any("mixture from" in entry["reason"] for entry in decided)

    place.train(1, *settings)
    assert place.lines(mixer, "mixture.jsonl") == decided
    metrics = place.lines(mixer, "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 27))
    assert place.hashes(mixer)[: len(seen)] == seen
    # What each step had is what the log says of its first sample.
    for line in metrics:
        held = [entry for entry in decided if entry["sample"] <= 8 * (line["step"] - 1)]
        weights = sorted(held, key=lambda entry: entry["sample"])[-1]["weights"]  # of two for a sample the later holds
        assert [domain["weight"] * TOTAL for domain in line["domains"].values()] == list(weights.values())


def test_the_tiers_of_the_promise_about_a_resume(place: Place) -> None:
    settings = ["mixture.mixer=velocitune", "mixture.velocitune.targets=targets.json"]
    place.train(2, "name=unbroken", *settings)
    place.train(2, "name=stage", *settings, killed_at=18)
    shutil.copytree(place.folder / "runs" / "stage", place.folder / "other")

    # G1, the same layout: bit-exact, the weights that are decided after the resume too.
    place.train(2, "name=stage", *settings)
    assert place.metrics("stage") == place.metrics("unbroken")
    for file in ("mixture.jsonl", "evaluation.jsonl"):
        assert place.lines("stage", file) == place.lines("unbroken", file)

    # G2, another layout: the same samples as long as the log goes, losses equal to tolerance.
    shutil.rmtree(place.folder / "runs" / "stage")
    shutil.move(place.folder / "other", place.folder / "runs" / "stage")
    decided = place.lines("stage", "mixture.jsonl")
    logged = 18 + 2 + 3  # steps until the weights take effect that the evaluation after the death decides
    place.train(1, "name=stage", *settings)
    found, expected = place.lines("stage", "mixture.jsonl"), place.lines("unbroken", "mixture.jsonl")
    assert found[: len(decided)] == decided == expected[: len(decided)]
    assert place.hashes("stage")[:logged] == place.hashes("unbroken")[:logged]
    for line, other in zip(place.metrics("stage"), place.metrics("unbroken"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-4)

    # G3, weights decided on the other layout: equal to tolerance.
    assert len(found) == len(expected) > len(decided)
    for line, other in zip(found, expected, strict=True):
        assert (line["sample"], line["reason"]) == (other["sample"], other["reason"])
        for name, weight in line["weights"].items():
            assert weight == pytest.approx(other["weights"][name], rel=1e-4)


def test_the_windows_that_gradients_come_from_take_the_turns_of_a_run_that_never_stopped(place: Place) -> None:
    settings = ["mixture.mixer=doge", "mixture.doge={regularisation: 1e-4, windows_per_domain: 4}", "duration=13 steps"]
    place.train(1, "name=turns", *settings)
    place.train(1, "name=turns-again", *settings, "stop_at=7 steps")
    stopped = place.lines("turns-again", "mixture.jsonl")
    place.train(1, "name=turns-again", *settings)
    found = place.lines("turns-again", "mixture.jsonl")
    assert found == place.lines("turns", "mixture.jsonl")
    assert found[: len(stopped)] == stopped
    assert len({json.dumps(entry["weights"]) for entry in found}) == len(found) > len(stopped)


def test_an_evaluation_that_gives_nan_keeps_the_weights_and_is_logged(place: Place) -> None:
    overrides = [
        "name=blind",
        "mixture.mixer=velocitune",
        "mixture.velocitune.targets=targets.json",
        "duration=12 steps",
    ]
    run_ranks(train_stage, 1, place.folder, "stage.yaml", overrides, None, 4)
    before, blind, after = place.lines("blind", "mixture.jsonl")[2:5]
    assert blind["weights"] == before["weights"] != after["weights"]
    assert blind["reason"] == "step 4: weights kept, the evaluation gave nan for python"
    assert [line["domains"]["python"]["loss"] is None for line in place.lines("blind", "evaluation.jsonl")] == [
        step == 4 for step in range(0, 13, 2)
    ]
    assert len(place.hashes("blind")) == 12


def test_a_run_keeps_the_targets_it_began_with(place: Place) -> None:
    settings = ["name=targets", "mixture.mixer=velocitune", "mixture.velocitune.targets=changing.json"]
    (place.folder / "changing.json").write_text(json.dumps(TARGETS))
    place.train(1, *settings, "stop_at=4 steps")
    assert "english: 5.9" in (place.folder / "runs" / "targets" / "config.yaml").read_text()
    (place.folder / "changing.json").write_text(json.dumps({"targets": {**TARGETS["targets"], "english": 5.8}}))
    with pytest.raises(RanksFailed, match=r"mixture.velocitune.targets.english=5.9, and now .*english=5.8"):
        place.train(1, *settings, "stop_at=6 steps")
    # The same numbers from another place are no change.
    (place.folder / "moved.json").write_text(json.dumps(TARGETS))
    place.train(1, *settings[:2], "mixture.velocitune.targets=moved.json", "stop_at=6 steps")
    assert len(place.hashes("targets")) == 6

"""Closed-loop weights in real runs: killed, resumed on another rank count, audited."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest
import yaml

from patience import PATIENCE
from rewarm.mixing.weights import TOTAL
from system.conftest import Workplace

VELOCITUNE = ["mixture.mixer=velocitune", "mixture.velocitune.targets={threes: 2.0, sevens: 3.0}"]
LENGTH = ["duration=16 steps", "evaluation.interval=2 steps"]


def kill_after_line(place: Workplace, number: int, *arguments: str) -> None:
    """Train and kill once the metrics file has that many lines."""
    process = place.start("train", *arguments)
    metrics = place.folder / "runs" / "continue" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= number:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)


def test_killed_on_two_ranks_and_resumed_on_one_it_keeps_to_the_log(workplace: Workplace) -> None:
    arguments = ["continue.yaml", *VELOCITUNE, *LENGTH]
    kill_after_line(workplace, 8, *arguments, "parallel.data=2")
    decided = workplace.lines("continue", "mixture.jsonl")
    seen = {line["step"]: line["sample_hash"] for line in workplace.lines("continue")}
    assert len(decided) > 3
    workplace.run("train", *arguments, "parallel.data=1")

    entries = workplace.lines("continue", "mixture.jsonl")
    assert entries[: len(decided)] == decided
    # Evaluations at 0, 2, ..., and 3 steps of 8 samples ahead; the last one within 16 steps is that of step 12.
    assert [entry["sample"] for entry in entries] == [0, *((step + 3) * 8 for step in range(0, 13, 2))]
    assert all(sum(entry["weights"].values()) == TOTAL for entry in entries)
    assert all(abs(entry["weights"]["counting"] - TOTAL // 4) <= 1 for entry in entries)
    assert len({json.dumps(entry["weights"]) for entry in entries}) > 3
    metrics = workplace.lines("continue")
    assert [line["step"] for line in metrics] == list(range(1, 17))
    assert {line["step"]: line["sample_hash"] for line in metrics if line["step"] in seen} == seen
    found = json.loads(workplace.run("mixture", "audit", "runs/continue", "--json"))
    assert (found["steps"], found["compared"], found["different"]) == (16, 16, [])


def test_doremi_weights_the_loss_against_a_run_and_hands_its_mean_on(workplace: Workplace) -> None:
    """The reference is an ordinary run on equal weights; the proxy is killed and goes on, on another rank count."""
    workplace.run("train", "continue.yaml", "name=reference", "duration=6 steps", "evaluation.interval=null")
    measured = workplace.lines("reference", "evaluation.jsonl")[-1]["domains"]
    doremi = ["continue.yaml", "mixture.mixer=doremi", "mixture.doremi.reference=runs/reference", *LENGTH]
    kill_after_line(workplace, 8, *doremi, "parallel.data=2")
    decided = workplace.lines("continue", "mixture.jsonl")
    assert len(decided) > 3
    workplace.run("train", *doremi, "parallel.data=1")

    first, *updates = workplace.lines("continue", "mixture.jsonl")
    assert [first, *updates][: len(decided)] == decided
    assert [entry["sample"] for entry in updates] == [(step + 3) * 8 for step in range(0, 13, 2)]
    assert all(entry["weights"] == first["weights"] for entry in updates) and "objective" not in first
    evaluations = {line["step"]: line["domains"] for line in workplace.lines("continue", "evaluation.jsonl")}
    shares = np.array([0.5, 0.5])
    for step, entry in zip(range(0, 13, 2), updates, strict=True):
        excess = [max(0.0, evaluations[step][name]["loss"] - measured[name]["loss"]) for name in ("threes", "sevens")]
        shares = 0.999 * shares * np.exp(excess) / (shares * np.exp(excess)).sum() + 0.0005
        found = np.array([entry["objective"][name] for name in ("threes", "sevens")]) / TOTAL
        assert found == pytest.approx(0.75 * shares, abs=1e-6)
        assert entry["objective"]["counting"] == entry["weights"]["counting"]
    line = workplace.lines("continue")[-1]["domains"]
    assert line["sevens"]["objective"] != line["sevens"]["weight"] == pytest.approx(0.375)

    steps = np.diff([0, *(entry["sample"] for entry in updates), 16 * 8])
    held = [[1, 1], *([entry["objective"][name] for name in ("threes", "sevens")] for entry in updates)]
    mean = steps @ (np.array(held) / np.sum(held, axis=1, keepdims=True)) / steps.sum()
    average = workplace.run("mixture", "average", "runs/continue").strip()
    assert list(json.loads(average).values()) == pytest.approx(mean, abs=1e-6)
    shown = yaml.safe_load(workplace.run("config", "show", "continue.yaml", f"mixture.weights={average}"))
    assert shown["mixture"]["weights"] == json.loads(average)

    refused = workplace.run("train", *doremi, "name=other", "evaluation.windows_per_domain=5", expect=2)
    assert "evaluated with evaluation.windows_per_domain=6, this stage has 5" in " ".join(refused.split())


def test_conditioning_costs_tokens_until_the_cooldown_and_leaves_the_samples(unbroken: Workplace) -> None:
    """Stopped inside the conditioned part and resumed, on a domain with a prefix, one without, and a replayed one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({str(number): number for number in range(300)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    (unbroken.folder / "tokenizer").mkdir()
    backend.save(str(unbroken.folder / "tokenizer" / "tokenizer.json"))
    arguments = [
        "continue.yaml", "name=conditioned", "tokenizer=tokenizer", "parallel.data=2",
        'mixture.conditioning.prefixes={threes: "17 4 2"}', "mixture.conditioning.until=8 steps",
    ]  # fmt: skip
    unbroken.run("train", *arguments, "stop_at=5 steps")
    unbroken.run("train", *arguments)
    plain, found = unbroken.lines("continue"), unbroken.lines("conditioned")
    assert [line["sample_hash"] for line in found] == [line["sample_hash"] for line in plain]
    for one, other in zip(found, plain, strict=True):
        fewer = {name: other["domains"][name]["tokens"] - one["domains"][name]["tokens"] for name in one["domains"]}
        windows = other["domains"]["threes"]["tokens"] // 16
        # Two targets at a window's start, three more for each document that begins inside.
        assert fewer["threes"] >= 2 * windows if one["step"] <= 8 else fewer["threes"] == 0
        assert fewer["sevens"] == fewer["counting"] == 0
    assert found[0]["grad_norm"] != plain[0]["grad_norm"]


def test_phases_and_their_plan_are_in_the_log_from_the_start(workplace: Workplace) -> None:
    phases = (
        "[{weights: {threes: 1, sevens: 3}, at: 50%}, {weights: {threes: 0, sevens: 1}, learning_rate_fraction: 0.2}]"
    )
    workplace.run("train", "continue.yaml", "mixture.mixer=phased", f"mixture.phased.phases={phases}")
    entries = workplace.lines("continue", "mixture.jsonl")
    assert [entry["reason"] for entry in entries] == ["start: phased", "phase 0", "phase 1"]
    assert entries[1]["sample"] == 6 * 8
    metrics = workplace.lines("continue")
    peak = max(line["learning_rate"] for line in metrics)
    # Line s is of the step that starts after s - 1 steps.
    first = next(line["step"] - 1 for line in metrics if line["step"] > 2 and line["learning_rate"] <= 0.2 * peak)
    assert entries[2]["sample"] == first * 8
    shares = {line["step"]: line["domains"]["sevens"]["weight"] for line in metrics}
    assert [round(shares[step], 6) for step in (1, 6, 7, first, first + 1)] == [0.375, 0.375, 0.5625, 0.5625, 0.75]

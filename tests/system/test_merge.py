"""Two probes merged in every proportion stand for the blends between them."""

from __future__ import annotations

import json

import pytest
import torch

from rewarm.data.domain import open_domain
from rewarm.evaluation.held_out import held_out_windows
from rewarm.train.open import open_model
from system.conftest import Workplace

PROBE = ["continue.yaml", "duration=6 steps", "evaluation.interval=null"]


def test_merged_probes_are_evaluated_and_the_best_blend_is_proposed(workplace: Workplace) -> None:
    for name, replay in (("little", 0.75), ("much", 0.125)):
        workplace.run("train", *PROBE, f"name={name}", f"replay.fraction={replay}")
    # Only the new domains count, so that the blend with more of them must win.
    arguments = ["runs/little", "runs/much", "--mixes", "3", "--divergence", "0.0001"]
    important = ["--importance", '{"threes": 1, "sevens": 1, "counting": 0}']
    found = json.loads(workplace.run("mixture", "merge", *arguments, *important, "--json"))

    first, middle, last = found["merged"]
    for ends, name in ((first, "little"), (last, "much")):
        measured = workplace.lines(name, "evaluation.jsonl")[-1]["domains"]
        for domain, loss in ends["loss"].items():
            assert loss == pytest.approx(measured[domain]["loss"], abs=1e-5), (name, domain)
    assert middle["weights"]["counting"] == pytest.approx((0.75 + 0.125) / 2, abs=0.03)
    assert middle["loss"]["threes"] == pytest.approx(halfway(workplace, "threes"), abs=1e-4)
    assert found["share"] > 0.9 and first["loss"]["threes"] > last["loss"]["threes"]
    assert found["weights"]["counting"] < 0.25

    text = workplace.run("mixture", "merge", "runs/little", "runs/continue-not-there", expect=2)
    assert "continue-not-there" in text
    assert "the same mixture" in workplace.run("mixture", "merge", "runs/much", "runs/much", expect=2)
    assert "the probes differ in parent" in workplace.run("mixture", "merge", "runs/much", "runs/base", expect=2)
    assert not list((workplace.folder / "runs").glob(".rewarm-merge-*"))


def halfway(workplace: Workplace, domain: str) -> float:
    """Loss of the mean of both models, by transformers alone."""
    from transformers import AutoModelForCausalLM

    models = []
    for name in ("little", "much"):
        workplace.run("export", f"runs/{name}", "--output", name)
        models.append(AutoModelForCausalLM.from_pretrained(workplace.folder / name))
    merged, other = models
    with torch.no_grad():
        for ours, theirs in zip(merged.parameters(), other.parameters(), strict=True):
            ours.copy_((ours + theirs) / 2)
        config = open_model(workplace.folder / "runs" / "much").config
        settings = config.data[domain].model_copy(update={"path": str(workplace.folder / domain)})
        held_out = open_domain(domain, settings, config.batch.sequence_length).held_out
        tokens = torch.from_numpy(held_out_windows(held_out, config.evaluation.windows_per_domain))
        logits = merged(input_ids=tokens[:, :-1], use_cache=False).logits
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

"""Whole runs of the deepspeed engine through the command line: killed, resumed elsewhere, exported, converted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks.command_workers import rewarm
from ranks.deepspeed_models import FAMILIES, write_model
from rewarm.config.data import DomainConfig
from rewarm.data.domain import open_domain
from rewarm.evaluation.held_out import held_out_windows
from system.conftest import Workplace, write_domain

Lines = list[dict[str, Any]]
LENGTH, WINDOWS, STEPS = 16, 6, 8
COMMON = f"""
engine: deepspeed
batch: {{sequence_length: {LENGTH}, global_batch_size: 8, micro_batch_size: 2}}
evaluation: {{interval: 4 steps, windows_per_domain: {WINDOWS}, micro_batch_size: 4}}
checkpoint: {{interval: 3 steps, keep: 2}}
tracking: {{wandb: {{mode: disabled}}}}
"""
BASE = (
    COMMON
    + """
name: base
parent: model
data: {counting: counting}
duration: 4 steps
schedule: {peak: 3e-3, warmup: 2 steps}
"""
)
CONTINUE = (
    COMMON
    + f"""
name: continue
parent: runs/base
data: {{threes: threes, sevens: sevens}}
replay: {{fraction: 0.25}}
duration: {STEPS} steps
schedule: {{start: 1e-3, peak: 3e-3, warmup: 2 steps}}
"""
)


def prepare(folder: Path, family: str) -> Workplace:
    """Domains, configurations and a trained base run."""
    place = Workplace(folder)
    for name, stride in (("counting", 1), ("threes", 3), ("sevens", 7)):
        write_domain(folder / name, stride)
    write_model(family, folder / "model")
    (folder / "base.yaml").write_text(BASE)
    (folder / "continue.yaml").write_text(CONTINUE)
    rewarm(folder, 1, "train", "base.yaml")
    return place


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """One base run for several tests, whose runs have different names."""
    return prepare(tmp_path_factory.mktemp("llama"), "llama")


def compare(found: Lines, expected: Lines) -> None:
    """The same samples, and losses and gradient norms to what another order of sums changes."""
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["sample_hash"] for line in found] == [line["sample_hash"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        assert line["learning_rate"] == wanted["learning_rate"]
        assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-5), line["step"]
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4), line["step"]


def transformers_loss(folder: Path, domain: Path) -> float:
    """Held-out loss in nats per token as transformers computes it from labels."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = held_out_windows(open_domain("any", DomainConfig(path=str(domain)), LENGTH).held_out, WINDOWS)
    windows = torch.from_numpy(tokens)
    with torch.no_grad():
        return float(model.eval()(input_ids=windows, labels=windows).loss)


ALWAYS = ("gemma", "gpt_neox")
"""What every run of the suite tries; the others are for -m slow."""


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in ALWAYS else pytest.mark.slow) for family in FAMILIES]
)
def test_killed_resumed_elsewhere_and_exported(family: str, tmp_path: Path) -> None:
    """Base, continued with replay, killed, resumed on another rank count and ZeRO stage, exported."""
    place = prepare(tmp_path, family)
    rewarm(tmp_path, 1, "train", "continue.yaml", "name=unbroken", "deepspeed.zero_stage=0")
    killed = ["deepspeed.zero_stage=2", "deepspeed.offload_optimizer=cpu"]
    rewarm(tmp_path, 2, "train", "continue.yaml", *killed, kill_after=("continue", 5))
    rewarm(tmp_path, 1, "train", "continue.yaml", "deepspeed.zero_stage=3")
    lines = place.lines("continue")
    compare(lines, place.lines("unbroken"))
    assert lines[-1]["loss"] < lines[0]["loss"]
    rewarm(tmp_path, 1, "export", "runs/continue", "--output", "export", "--check")
    last = place.lines("continue", "evaluation.jsonl")[-1]
    assert last["step"] == STEPS and set(last["domains"]) == {"threes", "sevens", "counting"}
    for name, measured in last["domains"].items():
        loss = transformers_loss(tmp_path / "export", tmp_path / name)
        assert measured["loss"] == pytest.approx(loss, abs=1e-5), name


@pytest.mark.parametrize("stage", [1, 3])
def test_killed_at_a_random_step_and_resumed_is_the_unbroken_run(
    stage: int, llama: Workplace, without_timing: Callable[[Lines], Lines]
) -> None:
    step = random.randint(1, STEPS - 2)
    print(f"killed after step {step}")
    unbroken, killed = f"unbroken-{stage}", f"killed-{stage}"
    train = ["train", "continue.yaml", f"deepspeed.zero_stage={stage}"]
    rewarm(llama.folder, 2, *train, f"name={unbroken}")
    rewarm(llama.folder, 2, *train, f"name={killed}", kill_after=(killed, step))
    rewarm(llama.folder, 2, *train, f"name={killed}")
    assert without_timing(llama.lines(killed)) == without_timing(llama.lines(unbroken))
    for file in ("evaluation.jsonl", "mixture.jsonl"):
        assert llama.lines(killed, file) == llama.lines(unbroken, file)


def test_converted_to_the_other_engine_and_back_is_the_unbroken_run(llama: Workplace) -> None:
    """Three steps under deepspeed, two under megatron, three under deepspeed on other ranks and another stage."""
    folder = llama.folder
    rewarm(folder, 1, "train", "continue.yaml", "name=unbroken")
    rewarm(folder, 1, "train", "continue.yaml", "name=part", "stop_at=3 steps")
    rewarm(folder, 1, "convert", "runs/part", "--engine", "megatron")
    rewarm(folder, 1, "train", "runs/part-megatron/config.yaml", "stop_at=5 steps")
    rewarm(folder, 1, "convert", "runs/part-megatron", "--engine", "deepspeed", "--output", "elsewhere/back")
    rewarm(folder, 2, "train", "elsewhere/back/config.yaml", "deepspeed.zero_stage=3")
    (folder / "elsewhere" / "back").rename(folder / "runs" / "back")
    compare(llama.lines("back"), llama.lines("unbroken"))
    evaluations = [llama.lines(run, "evaluation.jsonl")[-1]["domains"] for run in ("back", "unbroken")]
    for name, measured in evaluations[1].items():
        assert evaluations[0][name]["loss"] == pytest.approx(measured["loss"], abs=1e-5), name

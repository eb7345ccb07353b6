"""Every check of the schema: the message names the settings, and the nearest valid configuration passes."""

from __future__ import annotations

from typing import Any

import pytest

from rewarm.config.load import build
from rewarm.errors import UserError

BASE: dict[str, Any] = {"name": "run", "data": {"english": "e", "code": "c"}, "model": {}}
CONTINUE: dict[str, Any] = {"name": "run", "data": {"english": "e", "code": "c"}, "parent": "runs/base"}

# (what makes it wrong, what makes it right, what the message names)
CASES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    # The stage.
    ({"model": None}, {}, ["parent", "model"]),
    ({"parent": "runs/base"}, {"parent": "runs/base", "model": None}, ["model is ignored", "parent=runs/base"]),
    ({"name": "../run"}, {"name": "run-1.b_c"}, ["name"]),
    ({"data": {"a b": "x"}}, {"data": {"a_b-1": "x"}}, ["'a b'"]),
    ({"optimizer_state": "keep"}, {"optimizer_state": "reset"}, ["optimizer_state=keep", "parent"]),
    ({"duration": "5%"}, {"duration": "5 steps"}, ["duration='5%'"]),
    ({"duration": "0 steps"}, {"duration": "8192 tokens"}, ["duration='0 steps'", "less than one step"]),
    ({"duration": "long"}, {}, ["duration", "'long' is not a duration"]),
    ({"seed": 2**63}, {"seed": 2**63 - 1}, ["seed"]),
    # Mixture and replay.
    ({"mixture": {"weights": {"english": 1}}}, {"mixture": {"weights": {"english": 1, "code": 0}}}, ["'code'"]),
    (
        {"mixture": {"weights": {"english": 1, "code": 1, "maths": 1}}},
        {"mixture": {"weights": {"english": 1, "code": 1}}},
        ["mixture.weights", "'maths'"],
    ),
    ({"mixture": {"weights": {"english": 0, "code": 0}}}, {}, ["mixture.weights sum to 0"]),
    ({"mixture": {"weights": {"english": -1, "code": 2}}}, {}, ["'english'", "-1"]),
    (
        {"mixture": {"mixer": "proportional", "weights": {"english": 1, "code": 1}}},
        {"mixture": {"mixer": "proportional"}},
        ["mixture.weights", "mixture.mixer=proportional"],
    ),
    (
        {"mixture": {"odm": {"decay": 0.5}}},
        {"mixture": {"mixer": "odm", "odm": {"decay": 0.5}}},
        ["mixture.odm", "mixture.mixer=static"],
    ),
    (
        {"mixture": {"mixer": "velocitune"}},
        {"mixture": {"mixer": "velocitune", "velocitune": {"targets": {"english": 1, "code": 1}}}},
        ["mixture.velocitune.targets"],
    ),
    (
        {"mixture": {"mixer": "odm"}, "evaluation": {"interval": None}},
        {"mixture": {"mixer": "odm"}},
        ["mixture.mixer=odm", "evaluation.interval"],
    ),
    (
        {"mixture": {"mixer": "temperature", "temperature": {"cooldown_temperature": 2}}},
        {"mixture": {"mixer": "temperature", "temperature": {"cooldown_temperature": 2, "cooldown_at": "50%"}}},
        ["cooldown_temperature", "cooldown_at"],
    ),
    (
        {"mixture": {"mixer": "phased", "phased": {"phases": [{"weights": {"english": 1, "code": 1}}]}}},
        {"mixture": {"mixer": "phased", "phased": {"phases": [{"weights": {"english": 1, "code": 1}, "at": "5%"}]}}},
        ["exactly one of"],
    ),
    (
        {"mixture": {"mixer": "phased", "phased": {"phases": [{"weights": {"english": 1}, "at": "5%"}]}}},
        {},
        ["mixture.phased.phases[0].weights", "'code'"],
    ),
    ({"replay": {"fraction": 0.1}}, {}, ["replay.fraction=0.1", "parent"]),
    (
        {"engine": "deepspeed", "optimizer": {"name": "adamw_8bit"}, "deepspeed": {"offload_optimizer": "cpu"}},
        {"engine": "deepspeed", "optimizer": {"name": "adamw_8bit"}, "offload": {"mode": "cpu"}},
        ["optimizer.name=adamw_8bit", "deepspeed.offload_optimizer=cpu", "offload.mode"],
    ),
    ({"optimizer": {"name": "adam_8bit"}}, {"optimizer": {"name": "adamw_8bit"}}, ["optimizer.name", "'adamw_8bit'"]),
    # Shape.
    (
        {"model": {"num_attention_heads": 4, "num_key_value_heads": 3}},
        {"model": {"num_attention_heads": 4, "num_key_value_heads": 2}},
        ["num_attention_heads=4", "num_key_value_heads=3"],
    ),
    (
        {"model": {"hidden_size": 130}},
        {"model": {"hidden_size": 130, "head_dim": 32}},
        ["hidden_size=130", "num_attention_heads=4", "head_dim"],
    ),
    (
        {"batch": {"sequence_length": 4096}},
        {"batch": {"sequence_length": 4096}, "model": {"max_position_embeddings": 4096}},
        ["batch.sequence_length=4096", "model.max_position_embeddings=2048"],
    ),
    # Batch and layout.
    (
        {"batch": {"global_batch_size": 30, "micro_batch_size": 4}},
        {"batch": {"global_batch_size": 32, "micro_batch_size": 4}},
        ["batch.global_batch_size=30", "batch.micro_batch_size=4"],
    ),
    ({"parallel": {"sequence": True}}, {"parallel": {"sequence": True, "tensor": 2}}, ["parallel.sequence", "tensor"]),
    (
        {"parallel": {"sequence": True, "tensor": 2}, "batch": {"sequence_length": 255}},
        {"parallel": {"tensor": 2}, "batch": {"sequence_length": 255}},
        ["batch.sequence_length=255", "parallel.tensor=2"],
    ),
    (
        {"parallel": {"virtual_pipeline": 2}},
        {"parallel": {"virtual_pipeline": 2, "pipeline": 2}},
        ["parallel.virtual_pipeline=2", "parallel.pipeline=1"],
    ),
    ({"parallel": {"data": 0}}, {"parallel": {"data": "auto"}}, ["parallel.data=0"]),
    # Schedule.
    ({"schedule": {"kind": "infinite"}}, {"schedule": {"kind": "infinite", "plateau": 1e-4}}, ["schedule.plateau"]),
    ({"schedule": {"plateau": 1e-4}}, {}, ["schedule.plateau", "schedule.kind=cosine"]),
    ({"schedule": {"decay": "10%"}}, {"schedule": {"kind": "wsd", "decay": "10%"}}, ["schedule.decay", "cosine"]),
    (
        {"schedule": {"kind": "constant", "minimum": 1e-5}},
        {"schedule": {"kind": "linear", "minimum": 1e-5}},
        ["schedule.minimum", "schedule.kind=constant"],
    ),
    ({"schedule": {"minimum": 1.0}}, {}, ["schedule.minimum=1.0", "schedule.peak"]),
    ({"schedule": {"start": 1.0}}, {"schedule": {"start": 1e-4}}, ["schedule.start=1.0", "schedule.peak"]),
    (
        {"schedule": {"kind": "infinite", "plateau": 1e-4, "minimum": 2e-4}},
        {"schedule": {"kind": "infinite", "plateau": 2e-4, "minimum": 1e-4}},
        ["schedule.minimum=0.0002", "schedule.plateau=0.0001"],
    ),
    (
        {"schedule": {"kind": "infinite", "plateau": 1e-4, "cooldown": "0 steps"}},
        {"schedule": {"kind": "infinite", "plateau": 3e-4, "cooldown": "0 steps"}},
        ["schedule.cooldown=0 steps", "schedule.peak", "schedule.plateau=0.0001"],
    ),
    (
        {"schedule": {"start": 1e-5, "warmup": "0 steps"}},
        {"schedule": {"warmup": "0 steps"}},
        ["schedule.start=1e-05", "schedule.warmup=0 steps"],
    ),
    (
        {"schedule": {"kind": "wsd", "minimum": 1e-5, "decay": "0%"}},
        {"schedule": {"kind": "wsd", "decay": "0%"}},
        ["schedule.minimum=1e-05", "schedule.decay=0%"],
    ),
    (
        {"schedule": {"kind": "wsd", "decay_shape": "exponential"}},
        {"schedule": {"kind": "wsd", "decay_shape": "exponential", "minimum": 1e-6}},
        ["schedule.decay_shape=exponential", "schedule.minimum=0"],
    ),
    ({"schedule": {"peak": float("inf")}}, {}, ["schedule.peak"]),
]


@pytest.mark.parametrize(("wrong", "right", "named"), CASES, ids=lambda case: None)
def test_contradictions_are_named(wrong: dict[str, Any], right: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build({**BASE, **wrong})
    assert all(part in str(error.value) for part in named), str(error.value)
    build({**BASE, **right})


def test_domains_to_replay_need_a_fraction() -> None:
    replay = {"domains": {"english": 1}}
    with pytest.raises(UserError, match=r"replay\.fraction=0"):
        build({**CONTINUE, "replay": replay})
    build({**CONTINUE, "replay": {**replay, "fraction": 0.05}})


def test_moved_domains_need_a_parent_but_no_replay() -> None:
    replay = {"paths": {"english": "elsewhere"}}
    with pytest.raises(UserError, match=r"replay\.paths needs a parent"):
        build({**BASE, "replay": replay})
    build({**CONTINUE, "replay": replay})

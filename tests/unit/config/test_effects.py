"""No setting without effect: each is changed to another legal value, and something differs or the change is refused by
name."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rewarm
from rewarm.config.load import build
from rewarm.config.mixture import MIXER_SECTIONS, MixtureConfig
from rewarm.config.offload import _ONLY
from rewarm.config.reference import _sections
from rewarm.config.run import RunConfig
from rewarm.engine.deepspeed.json import deepspeed_json
from rewarm.errors import UserError
from rewarm.schedule.learning_rate import LearningRate

BASE: dict[str, Any] = {"name": "run", "parent": "p", "data": {"a": "x", "b": "y"}, "duration": "500 steps"}


OTHER: dict[str, dict[str, list[Any]]] = {
    "ScheduleConfig": {
        "peak": [2e-4], "minimum": [1e-5], "start": [2e-5], "warmup": ["7 steps", "0 steps"], "decay": ["7 steps"],
        "decay_shape": ["linear", "cosine"], "plateau": [1.5e-4], "cooldown": ["9 steps"],
    },
    "OptimizerConfig": {
        "beta1": [0.8], "beta2": [0.99], "epsilon": [1e-6], "weight_decay": [0.0], "gradient_clipping": [0.5],
    },
    "DeepSpeedConfig": {
        "offload_optimizer": ["cpu"], "offload_parameters": ["cpu"], "offload_ratio": [0.5], "nvme_path": ["/fast"],
        "sub_group_size": [1000], "bucket_size": [1000], "persistence_threshold": [10], "attention": ["eager"],
        "trust_remote_code": [True], "json_file": ["ds.json"], "extensions_folder": ["/ext"], "build_timeout": [3.0],
        "zero_stage": [2],
    },
    "MegatronConfig": {"attention": ["local"], "vocab_divisor": [64], "overlap_communication": [False]},
    "OffloadConfig": {
        "subgroup_size": [1 << 20], "slots": [4], "stride": [3], "resident_fraction": [0.5], "split_master": [False],
        "device_memory": [1.0], "host_memory": [1.0], "cpu_threads": [2], "nvme_paths": [["/fast"]], "profile": ["f"],
        "stand_in": [3.0],
    },
}  # fmt: skip
"""Legal values of settings, none of them the default."""


def changed(values: dict[str, Any], section: str, name: str, value: Any) -> RunConfig | None:
    """The configuration with one setting changed; None if that is refused, which has to name the setting."""
    values = copy.deepcopy(values)
    place = values
    for part in section.split("."):
        place[part] = dict(place.get(part, {}))
        place = place[part]
    place[name] = value
    try:
        return build(values)
    except UserError as error:
        assert f"{section}.{name}" in str(error) or name in str(error), str(error)
        return None


def rates(config: RunConfig) -> list[float]:
    schedule = LearningRate(config.schedule, config.total_tokens, config.tokens_per_step)
    return [schedule.at(step * config.tokens_per_step) for step in range(config.total_steps + 1)]


SCHEDULES: list[dict[str, Any]] = [
    {"kind": "constant"}, {"kind": "constant", "warmup": "0 steps"}, {"kind": "cosine"}, {"kind": "linear"},
    {"kind": "linear", "warmup": "0 steps"}, {"kind": "wsd"}, {"kind": "wsd", "decay": "0 steps"},
    {"kind": "wsd", "minimum": 1e-6, "decay_shape": "exponential"}, {"kind": "infinite", "plateau": 1e-4},
    {"kind": "infinite", "plateau": 1e-4, "decay": "0 steps"}, {"kind": "infinite", "plateau": 3e-4},
]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_setting_of_the_schedule_changes_a_rate_or_is_refused(schedule: dict[str, Any]) -> None:
    before = rates(build({**BASE, "schedule": schedule}))
    for name, values in OTHER["ScheduleConfig"].items():
        for value in values:
            if schedule.get(name) == value:
                continue
            config = changed({**BASE, "schedule": schedule}, "schedule", name, value)
            assert config is None or rates(config) != before, f"schedule.{name}={value} under {schedule}"


DEEPSPEED: list[dict[str, Any]] = [
    {"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2, "offload_optimizer": "cpu"}, {"zero_stage": 3},
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_ratio": 0.4},
    {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/nvme"},
    {"zero_stage": 3, "offload_parameters": "cpu"},
]  # fmt: skip
NOT_IN_THE_FILE = {"attention", "trust_remote_code", "extensions_folder", "build_timeout"}
"""Settings of the engine that are not DeepSpeed's own."""


@pytest.mark.parametrize("settings", DEEPSPEED, ids=str)
def test_every_setting_of_deepspeed_changes_its_file_or_is_refused(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"aio": {"queue_depth": 4}}')
    values = {**BASE, "engine": "deepspeed", "deepspeed": settings}
    before = deepspeed_json(build(values), 1)
    needs_compiler = settings.get("offload_ratio") or "nvme_path" in settings
    for name, (value, *_) in OTHER["DeepSpeedConfig"].items():
        if settings.get(name) == value:
            continue
        config = changed(values, "deepspeed", name, value)
        if name in NOT_IN_THE_FILE:
            is_read = name in ("attention", "trust_remote_code") or bool(needs_compiler)
            assert (config is not None) == is_read, f"deepspeed.{name} under {settings}"
        else:
            assert config is None or deepspeed_json(config, 1) != before, f"deepspeed.{name} under {settings}"


@pytest.mark.parametrize(("engine", "other"), [("megatron", "deepspeed"), ("deepspeed", "megatron")])
def test_settings_of_the_engine_that_is_not_chosen_are_refused(engine: str, other: str) -> None:
    section = type(getattr(build(BASE), other))
    assert set(OTHER[section.__name__]) == set(section.model_fields)
    for name, (value, *_) in OTHER[section.__name__].items():
        with pytest.raises(UserError) as error:
            build({**BASE, "engine": engine, other: {name: value}})
        assert f"{other}." in str(error.value)


def test_settings_of_an_optimizer_that_has_none_of_them_are_refused() -> None:
    for name, (value, *_) in OTHER["OptimizerConfig"].items():
        config = changed({**BASE, "optimizer": {"name": "sgd"}}, "optimizer", name, value)
        assert (config is None) == (name in ("beta1", "beta2", "epsilon"))
        for rule in ("adamw", "adamw_8bit"):
            assert changed({**BASE, "optimizer": {"name": rule}}, "optimizer", name, value) is not None


def test_settings_of_offload_are_refused_under_the_modes_that_do_not_read_them() -> None:
    modes = ("none", "auto", "cpu", "streamed", "twinflow", "deep_optimizer_states", "nvme")
    assert set(OTHER["OffloadConfig"]) == set(_ONLY)
    for mode, (name, (value, *_)) in itertools.product(modes, OTHER["OffloadConfig"].items()):
        settings = {"mode": mode, **({"nvme_paths": ["/other"]} if mode == "nvme" else {})}
        values = {**BASE, "precision": "bfloat16", "offload": settings}
        assert (changed(values, "offload", name, value) is not None) == (mode in _ONLY[name]), (mode, name)


@pytest.mark.parametrize(
    "values", [{"precision": "float32"}, {"precision": "bfloat16", "optimizer": {"name": "adamw_8bit"}}], ids=str
)
def test_nothing_is_split_where_there_is_nothing_to_split(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"offload.split_master=False is ignored by"):
        build({**BASE, **values, "offload": {"mode": "streamed", "split_master": False}})


def test_sections_of_the_mixers_that_are_not_chosen_are_refused() -> None:
    needed = {
        "velocitune": {"targets": {"a": 1, "b": 1}}, "dynamic_batch_loading": {"targets": {"a": 1, "b": 1}},
        "doremi": {"reference": {"a": 1, "b": 1}}, "skill_it": {"graph": {"a": {"b": 1}}},
        "phased": {"phases": [{"weights": {"a": 1, "b": 1}, "at": "50%"}]},
    }  # fmt: skip
    for mixer in MixtureConfig.model_fields["mixer"].annotation.__args__:  # type: ignore[union-attr]
        own = {mixer: needed[mixer]} if mixer in needed else {}
        assert build({**BASE, "mixture": {"mixer": mixer, **own}})
        for name in MIXER_SECTIONS:
            if name != mixer:
                with pytest.raises(UserError, match=rf"mixture.{name} is ignored by mixture.mixer={mixer}"):
                    build({**BASE, "mixture": {"mixer": mixer, **own, name: needed.get(name, {})}})


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"replay": {"windows": "all"}}, "replay.windows"),
        ({"replay": {"domains": {"a": 1}}}, "replay.domains"),
        ({"stop_at": "501 steps"}, "stop_at"),
        ({"parent": None, "model": {}, "replay": {"paths": {"a": "x"}}}, "replay.paths"),
        ({"mixture": {"mixer": "temperature", "temperature": {"cooldown_temperature": 2}}}, "cooldown_temperature"),
        ({"mixture": {"mixer": "unimax", "weights": {"a": 1, "b": 1}}}, "mixture.weights"),
        ({"parallel": {"virtual_pipeline": 2}}, "parallel.virtual_pipeline"),
        ({"parallel": {"sequence": True}}, "parallel.sequence"),
        ({"tracking": {"wandb": {"mode": "disabled", "project": "other"}}}, "tracking.wandb.project"),
        ({"tracking": {"wandb": {"mode": "disabled", "entity": "other"}}}, "tracking.wandb.entity"),
        ({"tracking": {"wandb": {"mode": "disabled", "group": "other"}}}, "tracking.wandb.group"),
        ({"model": {"num_layers": 2}}, "model is ignored"),
        ({"optimizer_state": "keep", "parent": None, "model": {}}, "optimizer_state"),
    ],
)
def test_settings_of_a_case_that_is_not_given_are_refused_by_name(values: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=re.escape(name)):
        build({**BASE, **values})


def test_every_setting_is_read_somewhere() -> None:
    """The least that a setting needs to have an effect: code outside the schema that reads it."""
    package = Path(rewarm.__file__).parent
    sources = [path for path in package.rglob("*.py") if path.parent.name != "config"]
    text = "\n".join(path.read_text() for path in sources)
    by_section = {"mixture.aioli", *(f"mixture.{name}" for name in MIXER_SECTIONS)}
    unread = [
        where
        for where, section, name in fields()
        if not re.search(rf"\.{name}\b|\"{name}\"", text)
        and not (section in by_section and "AioliRounds(names, weights, **settings.model_dump())" in text)
    ]
    assert unread == []


def fields() -> Iterator[tuple[str, str, str]]:
    for place, section in _sections("", RunConfig):
        for name in section.model_fields:
            yield f"{place}.{name}".removeprefix("."), place, name

"""From YAML and overrides to a checked configuration, and what a user reads when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rewarm.config.load import apply_override, build, dump, load
from rewarm.config.section import parse_duration, resolve_duration
from rewarm.errors import UserError

BASE: dict[str, Any] = {"name": "run", "data": {"english": "data/english"}, "model": {}}


def write(folder: Path, text: str) -> Path:
    path = folder / "stage.yaml"
    path.write_text(text)
    return path


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        build(values)
    return str(error.value)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    config = load(write(tmp_path, "name: a\nmodel: {}\ndata: {d: p}\nschedule: {peak: 3e-4, minimum: 1.5E-5}\n"))
    assert (config.schedule.peak, config.schedule.minimum) == (3e-4, 1.5e-5)


def test_a_plain_string_is_a_domain_path() -> None:
    assert build(BASE).data["english"].path == "data/english"


def test_overrides_reach_any_depth(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(BASE))
    overrides = [
        "schedule.peak=1e-3",
        "data.english.max_epochs=2",
        "data.code=data/code",
        "tracking.wandb.mode=disabled",
        "duration=2e6 tokens",
        "mixture.weights={english: 1, code: 3}",
        "parent=null",
    ]
    config = load(path, overrides)
    assert config.schedule.peak == 1e-3
    assert (config.data["english"].path, config.data["english"].max_epochs) == ("data/english", 2)
    assert config.data["code"].path == "data/code"
    assert config.tracking.wandb.mode == "disabled"
    assert config.total_steps == round(2e6 / (32 * 256))
    assert config.mixture.weights == {"english": 1, "code": 3}


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("schedule.peak", "not of the form"),
        ("=3", "not of the form"),
        ("a..b=3", "not of the form"),
        ("name.first=3", "name holds 'run'"),
        ("data.english.path.x=3", "path holds 'data/english'"),
        ("seed={", "not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_applied(override: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        values = {**BASE, "data": dict(BASE["data"])}
        apply_override(values, override)


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"schedul": {}}, "unknown setting schedul; did you mean schedule?"),
        ({"schedule": {"peek": 1}}, "unknown setting schedule.peek; did you mean schedule.peak?"),
        ({"tracking": {"wandb": {"projekt": "x"}}}, "did you mean tracking.wandb.project?"),
        ({"data": {"d": {"path": "p", "maxepochs": 1}}}, "did you mean data.d.max_epochs?"),
        ({"model": {"hidden_sise": 3}}, "did you mean model.hidden_size?"),
        (
            {"mixture": {"mixer": "phased", "phased": {"phases": [{"weights": {"english": 1}, "att": "5%"}]}}},
            "unknown setting mixture.phased.phases.0.att",
        ),
    ],
)
def test_a_misspelt_key_names_the_nearest(values: dict[str, Any], hint: str) -> None:
    assert hint in refused({**BASE, **values})


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    text = refused({**BASE, "checkpoint": {"zzz": 1}})
    assert "known here: interval, keep" in text


def test_all_problems_are_told_at_once() -> None:
    text = refused({"data": {"d": "p"}, "seed": -1, "batch": {"sequence_length": "long"}, "pricision": "float32"})
    for part in ("name is required", "seed", "batch.sequence_length", "given: 'long'", "did you mean precision?"):
        assert part in text


def test_every_unknown_setting_is_told_at_once_wherever_it_is() -> None:
    values = {
        **BASE, "sede": 1, "batch": {"sise": 1}, "data": {"d": {"path": "p", "epoks": 1}}, "schedule.peak": 1e-3,
        "tracking": {"intervall": 2, "wandb": {"projekt": "x"}}, "model": {"widht": 1}, "mixture": {"mixr": "static"},
    }  # fmt: skip
    text = refused(values)
    for where in ("sede", "batch.sise", "data.d.epoks", "tracking.intervall", "tracking.wandb.projekt", "model.widht",
                  "mixture.mixr", "schedule.peak"):  # fmt: skip
        assert f"unknown setting {where};" in text
    assert "dots belong on the command line" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": {"warmup": 100}}, "schedule.warmup: a length of training needs its unit: write '100 steps'"),
        ({"duration": 1e9}, "duration: a length of training needs its unit: write '1e+09 steps', '1e+09 tokens'"),
        ({"evaluation": {"interval": 0.5}}, "evaluation.interval: a length of training needs its unit"),
        ({"duration": "1e999 steps"}, "longer than any training"),
        ({"duration": "1e18 steps"}, "more than can be counted"),
        ({"name": 2024}, "name: text is wanted here: put it in quotes (given: 2024)"),
        ({"parent": 7, "model": None}, "parent: text is wanted here: put it in quotes (given: 7)"),
        ({"seed": True}, "seed: true and false are neither numbers nor text"),
        ({"mixture": {"weights": {"english": True}}}, "mixture.weights: true and false are neither"),
        ({"batch": 3}, "batch: a mapping of settings is wanted here (given: 3)"),
        ({"data": {"d": 3}}, "data.d: a domain is its path, or a mapping with path and more settings (given: 3)"),
        ({"data": {"d": None}}, "data.d: a domain is its path"),
        ({"parallel": {"data": "two"}}, "parallel.data: Input should be a valid integer"),
        ({"parallel": {"data": "two"}}, "or Input should be 'auto'"),
        (
            {"mixture": {"mixer": "velocitune", "velocitune": {"targets": {"english": "low"}}}},
            "mixture.velocitune.targets.english: Input should be a valid number",
        ),
        ({"seed": 10**5000}, "seed: a number of 16610 bits does not fit 64 bits"),
        ({"data": {2024: "x"}}, "data: the key 2024 is no text: put it in quotes"),
        ({"mixture": {"weights": {"english": float("nan")}}}, "mixture.weights.english: Input should be a finite"),
        ({"distributed": {"timeout": 1e300}}, "distributed.timeout"),
    ],
)
def test_messages_say_what_to_write(values: dict[str, Any], message: str) -> None:
    text = refused({**BASE, **values})
    assert message in text
    assert "dict[" not in text and "function-" not in text and "literal[" not in text


@pytest.mark.parametrize("unset", ["schedule.minimum=null", "schedule.minimum=", "schedule.minimum=~", "schedule=null"])
def test_a_setting_of_the_file_can_be_taken_back_on_the_command_line(tmp_path: Path, unset: str) -> None:
    path = write(tmp_path, yaml.safe_dump({**BASE, "schedule": {"minimum": 1e-5}}))
    with pytest.raises(UserError, match=r"schedule\.minimum=null.*takes it back"):
        load(path, ["schedule.kind=constant"])
    order = [unset, "schedule.kind=constant"]
    assert load(path, order).schedule.minimum == 0


def test_names_can_be_taken_out_of_a_mapping_on_the_command_line(tmp_path: Path) -> None:
    path = write(
        tmp_path, yaml.safe_dump({**BASE, "data": {"a": "x", "b": "y"}, "mixture": {"weights": {"a": 1, "b": 2}}})
    )
    config = load(path, ["data.b=null", "mixture.weights.b="])
    assert list(config.data) == ["a"] and config.mixture.weights == {"a": 1}
    assert load(path, ["mixture.weights=null"]).mixture.weights is None
    assert load(path, ["batch=null", "evaluation.interval=null"]).evaluation.interval is None


def test_a_section_without_settings_is_its_default() -> None:
    assert build({**BASE, "batch": None, "tracking": {"wandb": None}}) == build(BASE)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml: No such file"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="not valid YAML"):
        load(write(tmp_path, "a: [1"))
    with pytest.raises(UserError, match="list, not a mapping"):
        load(write(tmp_path, "- 1"))
    with pytest.raises(UserError, match="NoneType, not a mapping"):
        load(write(tmp_path, ""))


def test_a_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = build({**BASE, "schedule": {"kind": "wsd", "decay": "10%"}, "duration": "70 steps"})
    assert load(write(tmp_path, dump(config))) == config


def test_example_configurations_are_valid() -> None:
    paths = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))
    stages = [path for path in paths if "clusters" not in path.parts]
    assert stages
    for path in stages:
        load(path)


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("200 steps", 200, "steps"),
        ("1 step", 1, "steps"),
        ("1e9 tokens", 1e9, "tokens"),
        ("1_000_000tokens", 1e6, "tokens"),
        ("2.5%", 2.5, "%"),
        ("0 steps", 0, "steps"),
    ],
)
def test_durations(text: str, number: float, unit: str) -> None:
    assert parse_duration(text) == (number, unit)


@pytest.mark.parametrize("text", ["200", "-5 steps", "5 percent", "steps", "1e steps", "1 2 steps", ""])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("3 steps", 300), ("149 tokens", 100), ("151 tokens", 200), ("1 tokens", 100), ("0 steps", 0), ("10%", 1000),
     ("0.1%", 100), ("0%", 0)],
)  # fmt: skip
def test_durations_resolve_to_whole_steps(text: str, tokens: int) -> None:
    assert resolve_duration(text, tokens_per_step=100, total_tokens=10_000) == tokens


@pytest.mark.parametrize(
    ("mixer", "settings", "evaluated", "windows"),
    [("odm", {}, 64, 0), ("pike", {}, 64, 8), ("doge", {}, 5, 2), ("doge", {"windows_per_domain": 24}, 64, 24)],
)
def test_windows_whose_gradients_a_mixer_compares(mixer: str, settings: Any, evaluated: int, windows: int) -> None:
    mixture = {"mixer": mixer, mixer: settings}
    config = build({**BASE, "mixture": mixture, "evaluation": {"windows_per_domain": evaluated}})
    assert config.gradient_windows == windows


def test_one_window_has_no_variance() -> None:
    assert "windows_per_domain" in refused({**BASE, "mixture": {"mixer": "pike", "pike": {"windows_per_domain": 1}}})


@pytest.mark.parametrize("duration", ["8191 tokens", "0 steps", "0.5 steps"])
def test_a_stage_that_makes_no_step_is_refused_with_its_tokens_and_batch(duration: str) -> None:
    message = refused({**BASE, "duration": duration})
    assert "less than one step of batch.global_batch_size=32 windows of batch.sequence_length=256" in message
    assert "which is 8192" in message
    assert build({**BASE, "duration": "8192 tokens"}).total_steps == 1


def test_no_duration_is_no_step() -> None:
    assert build(BASE).steps("0 steps") == 0
    assert build(BASE).steps("1 tokens") == 1
    for setting in (
        {"stop_at": "0 steps"},
        {"evaluation": {"interval": "0%"}},
        {"checkpoint": {"interval": "0 steps"}},
    ):
        assert "is no step at all" in refused({**BASE, **setting})


@pytest.mark.parametrize("word", ["true", "1", "'yes'", "'on'"])
@pytest.mark.parametrize("override", ["deepspeed.trust_remote_code=true", "deepspeed={trust_remote_code: true}"])
def test_trust_in_python_files_is_given_by_the_command_line_alone(tmp_path: Path, override: str, word: str) -> None:
    """A file may come from anybody."""
    values = "name: x\nengine: deepspeed\nparent: p\ndata: {a: p}\n"
    (tmp_path / "plain.yaml").write_text(values)
    (tmp_path / "trusting.yaml").write_text(values + f"deepspeed: {{trust_remote_code: {word}}}\n")
    assert load(tmp_path / "plain.yaml", [override]).deepspeed.trust_remote_code
    assert load(tmp_path / "trusting.yaml", [override]).deepspeed.trust_remote_code
    assert not load(tmp_path / "trusting.yaml", ["deepspeed.trust_remote_code=false"]).deepspeed.trust_remote_code
    with pytest.raises(UserError, match=r"not taken from a file(.|\n)*deepspeed.trust_remote_code=true"):
        load(tmp_path / "trusting.yaml", ["deepspeed.zero_stage=2"])

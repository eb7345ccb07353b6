"""Settings that are paths: shells' abbreviations are replaced or refused, in every one of them."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm.config.data import DomainConfig, domain_of_option
from rewarm.config.load import build, dump
from rewarm.config.paths import PathText, expand_path
from rewarm.config.reference import _sections
from rewarm.config.run import RunConfig
from rewarm.config.section import Duration, alternatives
from rewarm.config.yaml_text import parse_yaml
from rewarm.errors import UserError

BASE: dict[str, Any] = {"name": "run", "parent": "p", "data": {"a": "x", "b": "y"}}
NOT_PATHS = {"name", "tracking.wandb.project", "tracking.wandb.entity", "tracking.wandb.group"}
"""Free text that is no path; what else is text is a path, a duration or a choice."""
PLACES: list[tuple[dict[str, Any], Any]] = [
    ({"runs_folder": "$"}, lambda c: c.runs_folder),
    ({"tokenizer": "$"}, lambda c: c.tokenizer),
    ({"parent": "$"}, lambda c: c.parent),
    ({"data": {"a": "$", "b": "y"}}, lambda c: c.data["a"].path),
    ({"data": {"a": {"path": "x", "held_out": "$"}, "b": "y"}}, lambda c: c.data["a"].held_out),
    ({"replay": {"paths": {"old": "$"}}}, lambda c: c.replay.paths["old"]),
    ({"offload": {"mode": "nvme", "nvme_paths": ["$"]}}, lambda c: c.offload.nvme_paths[0]),
    ({"offload": {"mode": "auto", "profile": "$"}}, lambda c: c.offload.profile),
    ({"engine": "deepspeed", "deepspeed": {"json_file": "$"}}, lambda c: c.deepspeed.json_file),
    (
        {"mixture": {"mixer": "velocitune", "velocitune": {"targets": "$"}}},
        lambda c: c.mixture.velocitune.targets,
    ),
    ({"mixture": {"mixer": "doremi", "doremi": {"reference": "$"}}}, lambda c: c.mixture.doremi.reference),
]


def text_fields() -> Iterator[tuple[str, Any, list[Any]]]:
    for place, section in _sections("", RunConfig):
        for name, field in section.model_fields.items():
            yield f"{place}.{name}".removeprefix("."), field.annotation, field.metadata


def test_every_text_setting_is_known_as_a_path_or_as_none() -> None:
    kinds = {typing.get_args(PathText)[-1], typing.get_args(Duration)[-1]}

    def is_free(annotation: Any, metadata: list[Any]) -> bool:
        if typing.get_origin(annotation) is typing.Annotated:
            return is_free(typing.get_args(annotation)[0], list(typing.get_args(annotation)[1:]))
        if annotation is str:
            return not kinds.intersection(m for m in metadata if m.__hash__ is not None)
        if typing.get_origin(annotation) in (dict, list):
            return is_free(typing.get_args(annotation)[-1], [])
        members = alternatives(annotation)
        return len(members) > 1 and any(is_free(member, []) for member in members)

    free = {where for where, annotation, metadata in text_fields() if is_free(annotation, metadata)}
    assert free == NOT_PATHS | {"mixture.conditioning.prefixes"}


def filled(values: Any, text: str) -> Any:
    if isinstance(values, dict):
        return {key: filled(value, text) for key, value in values.items()}
    return [filled(value, text) for value in values] if isinstance(values, list) else text if values == "$" else values


@pytest.mark.parametrize(("setting", "get"), PLACES)
def test_home_and_variables_are_replaced_in_every_path(
    setting: dict[str, Any], get: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    expected = {"~/x": "/home/me/x", "$SCRATCH/x": "/scratch/me/x", "a${SCRATCH}": "a/scratch/me", "a/~b": "a/~b"}
    for text, path in expected.items():
        config = build({**BASE, **filled(setting, text)})
        assert get(config) == path
        assert build(parse_yaml(dump(config))) == config
    for text, part in {"$NOWHERE/x": "NOWHERE is not set", "": "is empty", "a\nb": "line break"}.items():
        with pytest.raises(UserError, match=part):
            build({**BASE, **filled(setting, text)})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("~nobody-of-this-name/x", "no home folder for ~nobody-of-this-name"), ("${A B}", "no name of an"),
        ("$EMPTY/x", "EMPTY is not set"), ("$ODD/x", "ODD holds"), ("x" * 5000, "longer than any file system"),
        ("a\x1b[31m", "cannot be printed"), ("  ", "is empty"),
    ],
)  # fmt: skip
def test_paths_that_are_refused(text: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("ODD", "$HOME/x")
    with pytest.raises(ValueError, match=part):
        expand_path(text)


def test_a_dollar_that_begins_no_name_is_a_dollar() -> None:
    assert expand_path("cost-5$/x") == "cost-5$/x"
    assert Path(expand_path("~")).is_absolute()


def test_a_path_behind_an_option_is_read_as_in_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert domain_of_option("a", "~/x").path == "/home/me/x"
    assert domain_of_option("a", "x").held_out_fraction == DomainConfig(path="x").held_out_fraction
    with pytest.raises(UserError, match=r"a=\$NOWHERE_AT_ALL/x: .*is not set"):
        domain_of_option("a", "$NOWHERE_AT_ALL/x")

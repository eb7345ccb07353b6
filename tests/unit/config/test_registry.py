"""Methods by name: what is registered can be chosen and built, and nothing else can; extensions add their own."""

from __future__ import annotations

import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewarm.config.load import build, dump
from rewarm.config.registry import FAMILIES, MIXERS, SCHEDULES, SHAPES, Registry
from rewarm.config.run import CHOICES, RunConfig, run_schema
from rewarm.config.section import Section
from rewarm.errors import UserError
from rewarm.mixing.mixers.build import build_mixer
from rewarm.model.families.base import Family
from rewarm.schedule.learning_rate import LearningRate

NEEDED: dict[str, dict[str, Any]] = {
    "velocitune": {"targets": {"a": 1.0, "b": 1.0}},
    "dynamic_batch_loading": {"targets": {"a": 1.0, "b": 1.0}},
    "doremi": {"reference": {"a": 1.0, "b": 1.0}},
    "skill_it": {"graph": {"a": {"b": 1.0}}},
    "phased": {"phases": [{"weights": {"a": 1, "b": 3}, "at": "50%"}]},
}
"""Settings without a default."""


def stage(**values: Any) -> RunConfig:
    return build({"name": "x", "model": {}, "data": {"a": "a", "b": "b"}, **values})


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_of_the_schema_builds_its_own_class(name: str) -> None:
    mixture = {"mixer": name, **({name: NEEDED[name]} if name in NEEDED else {})}
    config = stage(mixture=mixture).mixture
    mixer = build_mixer(config, ["a", "b"], np.array([0.5, 0.5]), lambda text: 3)
    assert type(mixer) is MIXERS[name].target and mixer.name == name
    assert MIXERS[name].summary


SCHEDULE_SETTINGS: dict[str, dict[str, Any]] = {"infinite": {"plateau": 1e-4}}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_the_schema_has_phases_of_its_own(name: str) -> None:
    config = stage(schedule={"kind": name, **SCHEDULE_SETTINGS.get(name, {})})
    rate = LearningRate(config.schedule, 100 * 48, 48)
    assert rate.phases[0].shape == "warmup" and rate.at(48) == config.schedule.peak
    others = [LearningRate(stage(schedule={"kind": other, **SCHEDULE_SETTINGS.get(other, {})}).schedule, 4800, 48)
              for other in SCHEDULES if other != name]  # fmt: skip
    assert all(rate.fingerprint() != other.fingerprint() for other in others)


@pytest.mark.parametrize("name", SHAPES)
def test_every_decay_shape_of_the_schema_meets_its_ends(name: str) -> None:
    config = stage(schedule={"kind": "wsd", "decay_shape": name, "minimum": 1e-5, "decay": "50%"})
    phase = LearningRate(config.schedule, 4800, 48).phases[-1]
    assert phase.shape == name and phase.at(phase.begin) == 3e-4 and phase.at(phase.end) == 1e-5


@pytest.mark.parametrize("field", CHOICES)
def test_the_schema_offers_what_is_registered_and_nothing_else(field: str) -> None:
    """A name that is only in the schema has nothing behind it, and would fall through."""
    registry = CHOICES[field]
    annotation = RunConfig.model_fields[field].annotation
    section = typing.cast(type[Section], (typing.get_args(annotation) or (annotation,))[0])
    choice = registry.setting.rpartition(".")[2]
    assert set(typing.get_args(section.model_fields[choice].annotation)) == set(registry)
    for method in registry.methods():
        assert (method.name in section.model_fields) == (method.settings is not None)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no mixer 'velocitun' for mixture.mixer(.|\n)*did you mean 'velocitune'"):
        MIXERS["velocitun"]


def test_a_name_belongs_to_one_module() -> None:
    registry: Registry[Any] = Registry("mixer", "mixture.mixer", "rewarm.mixing.mixers")
    one, other = type("One", (), {"__module__": "one"}), type("Other", (), {"__module__": "other"})
    registry.register("mine")(one)
    with pytest.raises(ValueError, match="'mine' is registered by one and by other"):
        registry.register("mine")(other)


MINE = """
from rewarm.config.registry import MIXERS
from rewarm.config.section import Section
from rewarm.mixing.mixers.base import Mixer


class MineConfig(Section):
    '''Always the same share of the first domain.'''

    share: float = 0.9
    '''Share of it.'''


@MIXERS.register("mine", settings=MineConfig)
class MineMixer(Mixer):
    '''The first domain gets its share after the first evaluation.'''

    name = "mine"
    needs = ("losses",)

    def __init__(self, names, weights, *, share):
        super().__init__(names, weights)
        self.share = share

    def _next(self, observation):
        rest = (1 - self.share) / (len(self.names) - 1)
        return [self.share] + [rest] * (len(self.names) - 1)
"""


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module ``my_mixers`` in the working directory."""
    (tmp_path / "my_mixers.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(MIXERS._methods)
    yield tmp_path / "my_mixers.py"
    MIXERS._methods.clear()
    MIXERS._methods.update(before)
    sys.modules.pop("my_mixers", None)


def test_an_extension_is_chosen_like_a_built_in_method(extension: Path) -> None:
    config = stage(extensions=["my_mixers"], mixture={"mixer": "mine", "mine": {"share": 0.7}})
    assert isinstance(config, RunConfig) and run_schema() is not RunConfig
    assert config.mixture.is_updated
    mixer = build_mixer(config.mixture, ["a", "b"], np.array([0.5, 0.5]), lambda text: 3)
    assert type(mixer).__name__ == "MineMixer" and mixer.share == 0.7  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"unknown setting mixture.mine.shar; did you mean mixture.mine.share"):
        stage(extensions=["my_mixers"], mixture={"mixer": "mine", "mine": {"shar": 0.7}})


def test_a_family_of_an_extension_is_chosen_like_a_built_in_one() -> None:
    FAMILIES.register("mine")(type("Mine", (Family,), {"__module__": "mine", "__doc__": "A family."}))
    try:
        config = stage(model={"family": "mine"})
        assert config.model is not None and config.model.family == "mine"
        assert stage(model=None, parent="there").model is None
    finally:
        del FAMILIES._methods["mine"]
    with pytest.raises(UserError, match="model.family"):
        stage(model={"family": "mine"})


def test_the_resolved_configuration_names_the_file_by_its_digest(extension: Path) -> None:
    import yaml

    config = stage(extensions=["my_mixers"], mixture={"mixer": "mine"})
    resolved = yaml.safe_load(dump(config))
    assert len(resolved["extensions"]["my_mixers"]) == 64
    assert build(resolved) == config
    extension.write_text(extension.read_text() + "\n# changed\n")
    with pytest.raises(UserError, match="the file of my_mixers changed: its digest was"):
        build(resolved)


def test_extensions_that_cannot_be_used_are_named(extension: Path) -> None:
    with pytest.raises(UserError, match="there is no module missing_module"):
        stage(extensions=["missing_module"])
    (extension.parent / "broken_mixers.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="importing broken_mixers failed: ZeroDivisionError"):
        stage(extensions=["broken_mixers"])
    with pytest.raises(UserError, match="mixture.mixer: Input should be"):
        stage(mixture={"mixer": "mine"})

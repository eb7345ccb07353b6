"""What a resume may change, and what makes another stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rewarm.config.load import build, dump
from rewarm.config.run import RunConfig
from rewarm.config.training import without_unread
from rewarm.config.yaml_text import dump_yaml, parse_yaml
from rewarm.errors import UserError
from rewarm.train.folder import check_same_stage, prepare_folder


def config(**changes: Any) -> RunConfig:
    """A small configuration."""
    return build({"name": "x", "model": {}, "data": {"a": "p"}, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder that was started with the small configuration."""
    (tmp_path / "config.yaml").write_text(dump(config()))
    return tmp_path


def test_the_same_configuration_passes_silently(folder: Path) -> None:
    assert check_same_stage(config(), folder) == []


@pytest.mark.parametrize(
    "change",
    [
        {"parallel": {"tensor": 2}},
        {"stop_at": "5 steps"},
        {"data": {"a": "moved/p"}},
        {"batch": {"micro_batch_size": 2}},
        {"tracking": {"tensorboard": True}},
        {"checkpoint": {"keep": 5}},
        {"activation_recomputation": "full"},
    ],
)
def test_what_leaves_samples_and_schedule_alone_may_change_and_is_told(folder: Path, change: dict[str, Any]) -> None:
    messages = check_same_stage(config(**change), folder)
    assert len(messages) == 1 and "changed at this resume" in messages[0]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"duration": "7 steps"},
        {"schedule": {"peak": 1e-3}},
        {"batch": {"global_batch_size": 64}},
        {"data": {"a": "p", "b": "q"}},
        {"optimizer": {"beta2": 0.9}},
        {"precision": "bfloat16"},
    ],
)
def test_what_makes_another_stage_is_refused_with_both_values(folder: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="and now") as caught:
        check_same_stage(config(**change), folder)
    assert "parent:" in str(caught.value.fix)


def test_evaluation_is_part_of_the_recipe_where_it_decides_the_weights(tmp_path: Path) -> None:
    """A resume may look at the losses more often, unless the weights follow from what is seen."""
    for mixture, refused in (({"mixer": "static"}, False), ({"mixer": "odm"}, True)):
        before = config(mixture=mixture, evaluation={"interval": "100 steps"})
        (tmp_path / "config.yaml").write_text(dump(before))
        after = config(mixture=mixture, evaluation={"interval": "50 steps"})
        if refused:
            with pytest.raises(UserError, match="evaluation.interval"):
                check_same_stage(after, tmp_path)
        else:
            assert len(check_same_stage(after, tmp_path)) == 1


def test_runs_of_a_time_when_evaluations_took_8_windows_at_once_resume(tmp_path: Path) -> None:
    """What a forward pass takes at once decides rounding only, also where the weights follow the losses."""
    before = config(mixture={"mixer": "odm"}, evaluation={"micro_batch_size": 8})
    (tmp_path / "config.yaml").write_text(dump(before))
    after = config(mixture={"mixer": "odm"})
    assert after.evaluation_micro_batch_size == after.batch.micro_batch_size
    assert check_same_stage(after, tmp_path) == ["changed at this resume: evaluation.micro_batch_size=None (was 8)"]


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(UserError, match="/proc/nowhere/x cannot be written"):
        prepare_folder(config(runs_folder="/proc/nowhere").folder)


@pytest.mark.parametrize(
    ("schedule", "name", "value"),
    [
        ({"kind": "wsd", "decay": "0 steps"}, "decay_shape", "linear"),
        ({"kind": "infinite", "plateau": 3e-4}, "cooldown", "9 steps"),
    ],
)
def test_a_run_goes_on_that_holds_a_setting_which_no_rate_depends_on(
    tmp_path: Path, schedule: dict[str, Any], name: str, value: str
) -> None:
    """Versions before took it; this one refuses it in a configuration, but not in a run's own folder."""
    now = config(schedule=schedule)
    saved = parse_yaml(dump(now))
    saved["schedule"][name] = value
    (tmp_path / "config.yaml").write_text(dump_yaml(saved))
    with pytest.raises(UserError, match=rf"schedule\.{name}.* is ignored by"):
        build(saved)
    assert len(check_same_stage(now, tmp_path)) == 1
    assert build({**saved, "schedule": without_unread(saved["schedule"])}) == now
    assert without_unread("damaged") == "damaged" and without_unread({"decay": 3, "kind": "wsd"}) is not None

"""``rewarm config`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rewarm.cli.config import app
from rewarm.config.load import load
from rewarm.config.reference import reference
from rewarm.engine.deepspeed.json import deepspeed_json
from rewarm.errors import UserError


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    path = tmp_path / "stage.yaml"
    path.write_text("name: a\nmodel: {}\ndata: {d: p}\nduration: 100 steps\n")
    return path


def test_show_prints_a_configuration_that_resolves_to_itself(stage: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["show", str(stage), "schedule.kind=wsd", "schedule.peak=1e-3"])
    assert result.exit_code == 0
    again = tmp_path / "again.yaml"
    again.write_text(result.stdout)
    assert load(again) == load(stage, ["schedule.kind=wsd", "schedule.peak=1e-3"])
    assert yaml.safe_load(result.stdout)["checkpoint"]["keep"] == 2
    assert "# length: 100 steps of 8,192 tokens, 819,200 tokens\n" in result.stdout
    assert "# learning rate: warm-up 0 to 0.001 over 1 step, constant 0.001 over 79 steps" in result.stdout


def test_show_refuses_what_training_would_refuse(stage: Path) -> None:
    for override in ("seeds=3", "schedule.warmup=101 steps"):
        result = CliRunner().invoke(app, ["show", str(stage), override])
        assert isinstance(result.exception, UserError)
        assert result.stdout == ""


def test_show_says_what_is_not_there(stage: Path, tmp_path: Path) -> None:
    (tmp_path / "here.bin").touch()
    overrides = ["model=null", "parent=runs/gone", f"data.e={tmp_path}/here", "tokenizer=tok", "replay.paths.x=moved",
                 "schedule.start=parent", "mixture.mixer=doremi", "mixture.doremi.reference=ref"]  # fmt: skip
    result = CliRunner().invoke(app, ["show", str(stage), *overrides])
    assert result.exit_code == 0
    gone = [
        "parent=runs/gone",
        "data.d.path=p",
        "tokenizer=tok",
        "replay.paths.x=moved",
        "mixture.doremi.reference=ref",
    ]
    for text in gone:
        assert f"# not found here: {text}\n" in result.stdout and f"warning  {text}: nothing is there" in result.stderr
    assert "here.bin" not in result.output and f"{tmp_path}/here:" not in result.stderr
    assert "schedule.start=parent is not known here: parent=runs/gone" in result.stdout


def test_show_prints_the_deepspeed_configuration_that_the_engine_is_given(tmp_path: Path) -> None:
    stage, file = tmp_path / "stage.yaml", tmp_path / "ds.json"
    stage.write_text("name: a\nparent: p\nengine: deepspeed\ndata: {d: p}\nduration: 100 steps\n")
    more = ["--deepspeed", "deepspeed.zero_stage=2", "parallel.data=4"]
    result = CliRunner().invoke(app, ["show", str(stage), *more])
    assert json.loads(result.stdout) == deepspeed_json(load(stage, more[1:]), 4)
    file.write_text('{"gradient_clipping": "auto", "aio": {"queue_depth": 4}, "zero_optimization": {"stage": 2}}')
    merged = CliRunner().invoke(app, ["show", str(stage), *more, f"deepspeed.json_file={file}"])
    assert json.loads(merged.stdout) == json.loads(result.stdout) | {"aio": {"queue_depth": 4}}


def test_show_names_both_values_of_a_contradiction(tmp_path: Path) -> None:
    stage, file = tmp_path / "stage.yaml", tmp_path / "ds.json"
    stage.write_text("name: a\nparent: p\nengine: deepspeed\ndata: {d: p}\nduration: 100 steps\n")
    file.write_text('{"gradient_clipping": 0.3}')
    result = CliRunner().invoke(app, ["show", str(stage), "--deepspeed", f"deepspeed.json_file={file}"])
    assert isinstance(result.exception, UserError)
    assert f"{file} has gradient_clipping=0.3, but the run's settings give 1.0" in str(result.exception)
    result = CliRunner().invoke(app, ["show", str(stage), "--deepspeed", "engine=megatron"])
    assert "engine=megatron has no DeepSpeed configuration" in str(result.exception)


def test_reference_prints_the_document() -> None:
    assert CliRunner().invoke(app, ["reference"]).stdout == reference()

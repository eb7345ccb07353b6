"""``schedule.start: parent``: one number, from the lineage, found once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewarm.checkpoint import store
from rewarm.config.load import build, dump
from rewarm.config.model import ModelConfig
from rewarm.config.run import RunConfig
from rewarm.config.yaml_text import parse_yaml
from rewarm.data.indexed import IndexedWriter, token_dtype
from rewarm.errors import UserError
from rewarm.launch import start as launch
from rewarm.model.architecture import Architecture
from rewarm.replay.lineage import Lineage, Stage
from rewarm.schedule.learning_rate import LearningRate
from rewarm.train.origin import find_origin
from rewarm.train.parent_rate import with_parent_rate


def run(folder: Path, lineage: Lineage) -> Path:
    """A run with one checkpoint, without its tensors."""
    partial = store.begin(folder / "checkpoints", 3)
    architecture = Architecture.from_config(ModelConfig(), 64)
    (partial / "state.json").write_text(json.dumps({"engine": "megatron", "architecture": architecture.to_dict()}))
    for place in (partial, folder):
        lineage.save(place)
    store.commit(partial, 3, store.digest_files(partial, store.content_files(partial)))
    (folder / "config.yaml").write_text(dump(build({"name": folder.name, "model": {}, "data": {"a": "p"}})))
    return folder


def child(folder: Path, **schedule: Any) -> RunConfig:
    values = {"name": "child", "runs_folder": str(folder), "data": {"a": "p"}, "parent": str(folder / "base")}
    return build({**values, "duration": "100 steps", "schedule": {"start": "parent", "warmup": "10 steps", **schedule}})


def started(folder: Path, rate: float | None) -> Stage:
    return Stage("base", "run", str(folder / "base"), rate, 800)


def resolved(config: RunConfig) -> RunConfig:
    return with_parent_rate(config, find_origin(config).lineage)


def test_the_warm_up_rises_from_the_rate_at_which_the_parent_stopped(tmp_path: Path) -> None:
    run(tmp_path / "base", Lineage((Stage("older", "run", "/older", 1e-3), started(tmp_path, 2.5e-5))))
    config = resolved(child(tmp_path, peak=2e-4))
    assert config.schedule.start == 2.5e-5
    rates = LearningRate(config.schedule, config.total_tokens, config.tokens_per_step)
    assert rates.at(0) == pytest.approx(2.5e-5 + (2e-4 - 2.5e-5) / 10)
    assert "start: 2.5e-05" in dump(config)


def test_a_resume_knows_the_rate_without_the_parent_and_whatever_became_of_it(tmp_path: Path) -> None:
    base = run(tmp_path / "base", Lineage((started(tmp_path, 2.5e-5),)))
    own = Stage("child", "run", str(tmp_path / "child"), 1e-4, 40)
    run(tmp_path / "child", Lineage((started(tmp_path, 2.5e-5), own)))
    shutil.rmtree(base)
    assert resolved(child(tmp_path)).schedule.start == 2.5e-5
    run(tmp_path / "base", Lineage((started(tmp_path, 9e-5),)))
    assert resolved(child(tmp_path)).schedule.start == 2.5e-5


def test_a_parent_that_does_not_say_its_rate_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "base", Lineage((started(tmp_path, None),)))
    with pytest.raises(UserError, match=r"nothing says at which learning rate .*base.*\n.*schedule.start=3e-5"):
        resolved(child(tmp_path))
    with pytest.raises(UserError, match="nothing says at which learning rate /models/m"):
        with_parent_rate(child(tmp_path), Lineage((Stage("m", "huggingface", "/models/m"),)))


def test_a_rate_above_the_peak_is_refused_with_both(tmp_path: Path) -> None:
    run(tmp_path / "base", Lineage((started(tmp_path, 5e-4),)))
    with pytest.raises(UserError, match=r"schedule.start=parent is 0.0005, .* above schedule.peak=0.0003"):
        resolved(child(tmp_path))


def test_what_it_needs_is_said_before_any_file_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="schedule.start=parent needs a parent"):
        build({"name": "a", "model": {}, "data": {"a": "p"}, "schedule": {"start": "parent"}})
    with pytest.raises(UserError, match="schedule.start=parent is ignored by schedule.warmup=0 steps"):
        child(tmp_path, warmup="0 steps")
    with pytest.raises(UserError, match=r"schedule.start: .*number.*or Input should be 'parent'.*"):
        child(tmp_path, start="parents")
    with pytest.raises(UserError, match="is not resolved here"):
        LearningRate(child(tmp_path).schedule, 100, 10)


def test_a_resume_on_several_local_ranks_compares_the_number_that_the_run_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    writer = IndexedWriter(tmp_path / "p", token_dtype(64))
    for first in range(200):
        writer.add((np.arange(100) + first).astype(token_dtype(64)) % 64, [100])
    writer.close()
    own = Stage("child", "run", str(tmp_path / "child"), 1e-4, 40)
    folder = run(tmp_path / "child", Lineage((started(tmp_path, 2.5e-5), own)))
    values = parse_yaml(dump(child(tmp_path)))
    values |= {"batch": {"sequence_length": 16, "global_batch_size": 8, "micro_batch_size": 2}, "duration": "40 steps"}
    config = build(values | {"parallel": {"data": 2}})
    (folder / "config.yaml").write_text(dump(resolved(build(values))))
    monkeypatch.setattr(launch, "launch_local", lambda *arguments: 0)
    with pytest.raises(SystemExit) as end:
        launch.start(config, ["train", "child.yaml"])
    assert end.value.code == 0
    assert "changed at this resume: parallel.data=2 (was auto)" in "\n".join(launch.dry_run(config))
    assert "goes on from" in launch.dry_run(config)[0]

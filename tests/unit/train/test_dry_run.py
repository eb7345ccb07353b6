"""What ``rewarm train --dry-run`` says, refuses and leaves as it was."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from rewarm.cli.main import app
from rewarm.data.indexed import IndexedWriter, token_dtype
from rewarm.errors import UserError

STAGE = {
    "name": "stage", "data": {"a": "a", "b": "b"},
    "model": {
        "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 100,
    },
    "mixture": {"mixer": "phased", "weights": {"a": 3, "b": 1},
                "phased": {"phases": [{"weights": {"a": 1, "b": 3}, "at": "50%"}]}},
    "duration": "40 steps", "batch": {"sequence_length": 16, "global_batch_size": 8, "micro_batch_size": 2},
    "evaluation": {"interval": "10 steps"}, "checkpoint": {"interval": "15 steps"},
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("ab"):
        tokens = np.random.default_rng(seed).integers(0, 100, 4000).astype(token_dtype(100))
        writer = IndexedWriter(tmp_path / name, token_dtype(100))
        for first in range(0, 4000, 40):
            writer.add(tokens[first : first + 40], [40])
        writer.close()
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(STAGE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["train", "stage.yaml", "--dry-run", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def state_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def test_it_says_what_would_be_done_and_writes_nothing(place: Path) -> None:
    before = state_of(place)
    text = shown()
    assert state_of(place) == before
    for part in (
        "runs/stage, starts from random weights", "llama, ", " parameters, 2 layers of width 8, vocabulary 100",
        "none: token files without one", "engine megatron, 1 rank (alone), 4 micro-batches of 2 windows",
        "planned for the fullest rank: 0.0 GiB", "40 steps of 128 tokens, 5,120", "warm-up 0 to 0.0003 over 1 step",
        "at step 0, at the end, and every 10 steps: 3 times between",
        "at the end, and every 15 steps: 2 times between; keeps 2",
        "weights from sample 160: a 0.2500, b 0.7500 (phase 0)", "nothing was written or trained",
    ):  # fmt: skip
        assert part in text
    rows = {row.split()[0]: row.split() for row in text.splitlines() if row.split()[:1] in (["a"], ["b"])}
    windows = int(rows["a"][2])
    assert rows["a"][1:] == ["new", str(windows), "50.00%", "2.56k", f"{160 / windows:.3g}", "a"]


def test_the_ranks_are_those_that_would_be_started(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown("parallel.tensor=1", "parallel.pipeline=2", "parallel.data=2", "batch.micro_batch_size=1")
    assert "4 ranks (data 2 x pipeline 2), 4 micro-batches of 1 windows" in text
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert "2 ranks (data 2)" in shown()
    monkeypatch.setenv("RANK", "1")
    assert shown() == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.a=nowhere"], "nowhere"),
        (["model=null", "parent=nowhere"], "parent=nowhere: there is no such folder"),
        (["tokenizer=nowhere"], "nowhere"),
        (["parallel.tensor=3"], "parallel.tensor=3 does not divide"),
        (["schedule.warmup=41 steps"], "need"),
        (["data.a.max_epochs=0.1"], "domain 'a' has .*max_epochs=0.1"),
        (["mixture.phased.phases=[{weights: {a: 1, b: 3}, at: 41 steps}]"], "is step 41"),
        (["mixture={mixer: velocitune, velocitune: {targets: nowhere.json}}"], "cannot read the targets nowhere.json"),
        (["runs_folder=stage.yaml"], "cannot be written"),
        (["batch.micro_batch_size=3"], "batch.micro_batch_size=3"),
    ],
)
def test_what_training_would_refuse_is_refused(place: Path, overrides: list[str], message: str) -> None:
    before = state_of(place)
    with pytest.raises(UserError, match=message):
        shown(*overrides)
    assert state_of(place) == before


def test_a_folder_that_cannot_be_written_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and access(path, mode))
    with pytest.raises(UserError, match="cannot be written"):
        shown()

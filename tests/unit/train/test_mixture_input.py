"""What is wrong about a mixture is said before the ranks start; what steers it may not change under a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from rewarm.config.load import load
from rewarm.data.indexed import IndexedWriter, token_dtype
from rewarm.errors import UserError
from rewarm.train.stage import Stage, resolve_stage

STAGE = {
    "name": "stage",
    "data": {"a": "a", "b": {"path": "b", "held_out": "b-held-out"}},
    "model": {
        "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1,
        "vocab_size": 100,
    },
    "duration": "10 steps",
    "batch": {"sequence_length": 16, "global_batch_size": 8, "micro_batch_size": 8},
}  # fmt: skip
TARGETS = "mixture.velocitune.targets="


def write(prefix: Path, seed: int, num_tokens: int = 4000) -> None:
    """A pair of noise, in documents of 40 tokens."""
    tokens = np.random.default_rng(seed).integers(0, 100, num_tokens).astype(token_dtype(100))
    writer = IndexedWriter(prefix, token_dtype(100))
    for first in range(0, num_tokens, 40):
        writer.add(tokens[first : first + 40], [40])
    writer.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two domains and files of targets, to work in."""
    for seed, name in enumerate(("a", "b", "b-held-out")):
        write(tmp_path / name, seed)
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(STAGE))
    (tmp_path / "some.json").write_text(json.dumps({"targets": {"a": 1.0}}))
    (tmp_path / "broken.json").write_text('{"targets": {"a": 1.0, "b": NaN}}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolve(*overrides: str) -> Stage:
    """The stage as ``rewarm train`` looks it up before it starts a rank."""
    return resolve_stage(load("stage.yaml", overrides), 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mixture.weights={a: 0, b: 0}"], "mixture.weights sum to 0"),
        (["mixture.weights={a: 1, b: -1}"], "domain 'b' in mixture.weights is -1"),
        (["mixture.weights={a: .nan, b: 1}"], r"mixture.weights.a: Input should be a finite number \(given: nan\)"),
        (["mixture.weights={a: .inf, b: 1}"], r"mixture.weights.a: Input should be a finite number \(given: inf\)"),
        (["mixture.weights={a: 1, b: 1, c: 1}"], "mixture.weights names 'c', which is not in data"),
        (["mixture.weights={a: 1}"], "mixture.weights has no weight for 'b'|'b'"),
        (["mixture.mixer=velocitune"], "needs mixture.velocitune.targets"),
        (["mixture.mixer=velocitune", TARGETS + "{a: 1, b: 1, c: 1}"], "targets names 'c', which is not one of"),
        (["mixture.mixer=velocitune", TARGETS + "{a: 1, b: .nan}"], r"b: Input should be a finite .*given: nan"),
        (["mixture.mixer=velocitune", TARGETS + "none.json"], "cannot read the targets none.json"),
        (["mixture.mixer=velocitune", TARGETS + "some.json"], "targets has no value for domain 'b'"),
        (["mixture.mixer=velocitune", TARGETS + "broken.json"], "targets of domain 'b' is nan"),
        (["mixture.mixer=skill_it", "mixture.skill_it.graph={a: {c: 1}}"], "the graph of skill_it names 'c'"),
        (["mixture.mixer=aioli", "mixture.aioli.probe_share=0.5"], "0.5 of 2 domains is no more than an equal share"),
        (["data.a.max_epochs=0.1"], "domain 'a' has .* windows and max_epochs=0.1, but 80 samples would take 40 of it"),
        (["mixture.mixer=odm", "data.a.max_epochs=0.1"], "domain 'a' has .* and max_epochs=0.1"),
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_is_refused_before_the_ranks_start(
    place: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(*overrides)
    assert caught.value.fix


def test_held_out_text_that_steers_the_weights_may_not_change_between_resumes(place: Path) -> None:
    steering = ["mixture.mixer=odm"]
    state = json.loads(json.dumps(resolve(*steering).controller().state_dict()))
    resolve(*steering).controller().load_state_dict(state)
    write(place / "b-held-out", seed=9)
    with pytest.raises(UserError, match="held-out text of domain 'b' changed since the checkpoint"):
        resolve(*steering).controller().load_state_dict(state)

"""What a stage replays of its lineage, from the first sample on and at a resume of a run that older code began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rewarm.checkpoint import store
from rewarm.checkpoint.distributed import read_state
from rewarm.config.load import build, dump, load
from rewarm.config.run import RunConfig
from rewarm.data.indexed import IndexedWriter, token_dtype
from rewarm.errors import UserError
from rewarm.mixing.sampler import Sampler
from rewarm.train.dry_run import dry_run
from rewarm.train.folder import check_same_stage
from rewarm.train.stage import Stage, resolve_stage

MODEL = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1,
         "vocab_size": 100}  # fmt: skip
BATCH = {"sequence_length": 16, "global_batch_size": 8, "micro_batch_size": 8}


def write(prefix: Path, seed: int) -> None:
    """A pair of noise, in 100 documents of 40 tokens: 247 windows of 16 after what is held out."""
    tokens = np.random.default_rng(seed).integers(0, 100, 4000).astype(token_dtype(100))
    writer = IndexedWriter(prefix, token_dtype(100))
    for first in range(0, len(tokens), 40):
        writer.add(tokens[first : first + 40], [40])
    writer.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with domains to work in."""
    for seed, name in enumerate("abc"):
        write(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(name: str, domain: str, parent: str | None = None, **more: Any) -> RunConfig:
    """A stage of 10 steps on a domain, with a quarter of replay where it has a parent."""
    origin: dict[str, Any] = {"model": MODEL} if parent is None else {"parent": f"runs/{parent}"}
    if parent is not None:
        origin["replay"] = {"fraction": 0.25}
    return build({"name": name, "data": {domain: domain}, "duration": "10 steps", "batch": BATCH, **origin, **more})


def drawn(stage: Stage, steps: int = 10, sampler: Sampler | None = None) -> dict[str, list[int]]:
    """Windows of each domain that a stage draws."""
    sampler = sampler or stage.sampler(None, stage.planned)
    draw = sampler.draw(8 * steps)
    return {name: draw.windows[draw.domains == index].tolist() for index, name in enumerate(stage.names)}


def save(stage: Stage, steps: int = 10) -> Path:
    """The run folder that the stage leaves after so many steps, without tensors; gives its checkpoint."""
    sampler = stage.sampler(None, stage.planned)
    sampler.draw(8 * steps)
    stage.folder.mkdir(parents=True)
    partial = store.begin(stage.folder / "checkpoints", steps)
    state = {"engine": "megatron", "architecture": stage.architecture.to_dict(), "step": steps,
             "sampler": sampler.state_dict(), "replay": stage.replay_windows}  # fmt: skip
    (partial / "state.json").write_text(json.dumps(state))
    cursors = dict(zip(stage.names, sampler.cursors.tolist(), strict=True))
    stage.lineage(1e-3, steps * 128, cursors).save(partial)
    store.commit(partial, steps, store.digest_files(partial, store.content_files(partial)))
    (stage.folder / "config.yaml").write_text(dump(stage.config))
    return stage.folder / "checkpoints" / f"step-{steps}"


def test_a_child_replays_the_parents_windows_in_their_order_and_the_grandchild_goes_on(place: Path) -> None:
    base = resolve_stage(config("base", "a"), 1)
    save(base)
    child = resolve_stage(config("child", "b", "base"), 1)
    consumed, fed_back = drawn(base)["a"], drawn(child)["a"]
    assert len(consumed) == 80 and fed_back == consumed[:20]
    save(child)
    grandchild = resolve_stage(config("grandchild", "c", "child", seed=7), 1)
    found = drawn(grandchild)
    # a was trained on for 80 windows and b for 60: 20 replayed windows are shared by what each was trained on.
    assert found["a"] == consumed[20 : 20 + len(found["a"])] and len(found["a"]) in (12, 13)
    assert found["b"] == drawn(child)["b"][: len(found["b"])]
    # A stage on the first domain goes on after what was consumed; the replay in between does not count.
    order = base.sampler(None, base.planned)
    again = resolve_stage(config("again", "a", "child", replay={"fraction": 0.25, "domains": {"b": 1}}), 1)
    assert drawn(again)["a"] == order.draw(200).windows[80:140].tolist()


def test_the_unseen_and_all_are_asked_for_by_name(place: Path) -> None:
    base = resolve_stage(config("base", "a"), 1)
    save(base)
    order = base.sampler(None, base.planned).draw(200).windows.tolist()
    for windows in ("unseen", "all"):
        stage = resolve_stage(config("child", "b", "base", replay={"fraction": 0.25, "windows": windows}), 1)
        assert drawn(stage)["a"] == order[80:100]
    long = {"duration": "90 steps", "replay": {"fraction": 0.25, "windows": "unseen"}}
    with pytest.raises(UserError, match="'a' has 167 windows that the lineage has not trained on, but 720 samples"):
        resolve_stage(config("child", "b", "base", **long), 1)
    long["replay"] = {"fraction": 0.25, "windows": "all"}
    found = drawn(resolve_stage(config("child", "b", "base", **long), 1), 90)["a"]
    assert sorted(order[:80] + found[:167]) == list(range(247)) and len(found) == 180
    with pytest.raises(UserError, match=r"replay.windows=all is ignored with replay.fraction=0"):
        config("child", "b", "base", replay={"windows": "all"})


def test_more_than_was_seen_comes_again_from_the_start(place: Path) -> None:
    base = resolve_stage(config("base", "a"), 1)
    save(base, steps=2)
    consumed = drawn(base, 2)["a"]
    assert len(consumed) == 16
    assert drawn(resolve_stage(config("child", "b", "base"), 1))["a"] == [*consumed, *consumed[:4]]
    save(resolve_stage(config("short", "a"), 1), steps=1)
    heavy = {"fraction": 0.5, "domains": {"a": 1}}
    batch = {**BATCH, "global_batch_size": 32}
    with pytest.raises(UserError, match=r"'a' \(.*a\) has 8 windows of 16 tokens that replay.windows=seen allows, but"):
        resolve_stage(config("child", "b", "short", replay=heavy, batch=batch), 1)


def test_other_windows_than_the_lineages_are_refused_or_asked_for(place: Path) -> None:
    save(resolve_stage(config("base", "a"), 1))
    longer = {"batch": {**BATCH, "sequence_length": 32}}
    with pytest.raises(UserError, match="lineage trained on part of domain 'a', in windows of 16 tokens and not in"):
        resolve_stage(config("child", "b", "base", **longer), 1)
    replay = {"fraction": 0.25, "windows": "all"}
    assert len(drawn(resolve_stage(config("child", "b", "base", replay=replay, **longer), 1))["a"]) == 20


def as_older_code_left_it(checkpoint: Path) -> None:
    """Take out what older code did not write: the setting, its trace in the checkpoint, and whether it was a replay."""
    run = checkpoint.parents[1]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    del settings["replay"]["windows"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    state = read_state(checkpoint)
    del state["replay"]
    lineage = json.loads((checkpoint / "lineage.json").read_text())
    for stage in lineage["stages"]:
        for domain in stage["domains"]:
            del domain["replayed"]
    for name, value in (("state.json", state), ("lineage.json", lineage)):
        (checkpoint / name).write_text(json.dumps(value))
    step = store.step_of(checkpoint)
    assert step is not None
    partial = store.begin(checkpoint.parent, step + 100)
    for file in checkpoint.iterdir():
        if file.name in ("state.json", "lineage.json"):
            (partial / file.name).write_bytes(file.read_bytes())
    store.commit(partial, step + 100, store.digest_files(partial, store.content_files(partial)))


def test_a_run_that_began_before_the_setting_goes_on_as_it_began(place: Path) -> None:
    save(resolve_stage(config("base", "a"), 1))
    began = resolve_stage(config("child", "b", "base", replay={"fraction": 0.25, "windows": "all"}), 1)
    whole = drawn(began)
    as_older_code_left_it(save(began, steps=4))
    asked = config("child", "b", "base")
    assert asked.replay.windows == "seen"
    for again in range(2):
        stage = resolve_stage(asked, 1)
        assert stage.config.replay.windows == "all" and stage.replay_windows is None
        assert any("began before replay.windows was a setting" in message for message in stage.messages)
        assert check_same_stage(stage.config, stage.folder) == []
        state = read_state(stage.folder / "checkpoints" / f"step-{104 + again}")["sampler"]
        rest = drawn(stage, 6, stage.sampler(state, stage.planned))
        assert {name: windows[-len(rest[name]) :] for name, windows in whole.items()} == rest
        # The same holds after the resume has saved: its configuration names the setting, its checkpoints do not.
        (stage.folder / "config.yaml").write_text(dump(stage.config))
        partial = store.begin(stage.folder / "checkpoints", 105 + again)
        older = stage.folder / "checkpoints" / f"step-{104 + again}"
        state = {**read_state(older), "replay": stage.replay_windows}
        (partial / "state.json").write_text(json.dumps(state))
        (partial / "lineage.json").write_bytes((older / "lineage.json").read_bytes())
        store.commit(partial, 105 + again, store.digest_files(partial, store.content_files(partial)))


def test_a_child_of_a_run_of_older_code_replays_what_that_run_drew(place: Path) -> None:
    base = resolve_stage(config("base", "a"), 1)
    as_older_code_left_it(save(base))
    assert drawn(resolve_stage(config("child", "b", "base"), 1))["a"] == drawn(base)["a"][:20]


def test_another_choice_is_refused_at_a_resume(place: Path) -> None:
    save(resolve_stage(config("base", "a"), 1))
    save(resolve_stage(config("child", "b", "base"), 1), steps=4)
    changed = resolve_stage(config("child", "b", "base", replay={"fraction": 0.25, "windows": "all"}), 1)
    with pytest.raises(UserError, match="replay.windows=seen, and now replay.windows=all"):
        check_same_stage(changed.config, changed.folder)


def test_a_phase_by_loss_that_takes_the_objectives_samples_is_refused_before_the_ranks_start(place: Path) -> None:
    phases = [{"weights": {"a": 0, "b": 1}, "loss_below": {"a": 2.0}}]
    mixture = {"mixer": "phased", "objective": {"a": 1, "b": 1}, "phased": {"phases": phases}}
    values = {"data": {"a": "a", "b": "b"}, "mixture": mixture, "evaluation": {"interval": "2 steps"}}
    with pytest.raises(UserError, match=r"gives 'a' the weight 1.0, but nothing is sampled from it \(phase 0\)"):
        resolve_stage(config("stage", "a", **values), 1)
    # A run of older code may have begun with it.
    accepted = config("stage", "a", **{**values, "mixture": {**mixture, "objective": {"b": 1}}})
    as_older_code_left_it(save(resolve_stage(accepted, 1), steps=2))
    resolve_stage(config("stage", "a", **values), 1)


def test_a_dry_run_counts_epochs_from_where_the_ancestors_stopped(place: Path) -> None:
    save(resolve_stage(config("base", "a"), 1))
    save(resolve_stage(config("child", "b", "base"), 1))
    rows = dry_run(config("next", "b", "child", replay={"fraction": 0.25, "domains": {"a": 1}}), 1)
    found = {words[0]: words for words in map(str.split, rows)}
    # Of b's 247 windows the child drew 60, and this stage draws 60 more; of a's 80 seen ones 20 and 20.
    assert found["b"][1:3] == ["new", "247"] and found["b"][5:8] == ["0.243", "to", "0.486"]
    assert found["a"][1:3] == ["replayed", "80"] and found["a"][5:8] == ["0.25", "to", "0.5"]


def test_the_file_of_a_stage_can_name_the_setting(place: Path) -> None:
    (place / "stage.yaml").write_text(yaml.safe_dump(
        {"name": "x", "data": {"b": "b"}, "parent": "runs/base", "duration": "10 steps", "batch": BATCH,
         "replay": {"fraction": 0.1, "windows": "unseen"}}))  # fmt: skip
    assert load("stage.yaml", ["replay.windows=seen"]).replay.windows == "seen"
    with pytest.raises(UserError, match="replay.windows"):
        load("stage.yaml", ["replay.windows=fresh"])


@pytest.mark.parametrize("fraction", [0.25, 0])
def test_a_lineage_domain_that_is_gone_is_not_blamed_on_a_key_of_the_stage(place: Path, fraction: float) -> None:
    save(resolve_stage(config("base", "a"), 1))
    for suffix in (".bin", ".idx"):
        (place / f"a{suffix}").rename(place / f"moved{suffix}")
    child = config("child", "b", "base", replay={"fraction": fraction})
    if fraction:
        with pytest.raises(UserError) as caught:
            resolve_stage(child, 1)
        said = str(caught.value)
    else:
        said = "\n".join(resolve_stage(child, 1).messages)
    assert "data.a" not in said and "replay.paths.a" in said
    assert f"'a' of the lineage is not at {place / 'a'}: there is neither such a folder nor {place / 'a'}.bin" in said

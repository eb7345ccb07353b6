"""Lineage and the choice of what to replay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rewarm.config.mixture import ReplayConfig
from rewarm.errors import UserError
from rewarm.replay.lineage import ConsumedDomain, Lineage, Stage
from rewarm.replay.select import resolve_replay


def domain(name: str, tokens: int, content: str | None = None, path: str | None = None) -> ConsumedDomain:
    return ConsumedDomain(name, path or f"/data/{name}", None, content or f"hash of {name}", tokens, tokens // 8, "tok")


GRANDPARENT = Stage("base", "run", "/runs/base", 1e-5, 800, (domain("english", 800),))
PARENT = Stage("code", "run", "/runs/code", 2e-5, 400, (domain("python", 240), domain("prose", 160, "hash of english")))
LINEAGE = Lineage((GRANDPARENT, PARENT))
DISK = {"/data/english": "hash of english", "/data/prose": "hash of english", "/data/python": "hash of python"}


def fingerprint(_: ConsumedDomain, path: str) -> str:
    if path not in DISK:
        raise FileNotFoundError(2, "No such file or directory")
    return DISK[path]


def names(replay: ReplayConfig, new: dict[str, str] | None = None) -> dict[str, float]:
    return {d.name: d.proportion for d in resolve_replay(LINEAGE, replay, new or {}, fingerprint)}


def test_lineage_goes_through_its_file(tmp_path: Path) -> None:
    LINEAGE.save(tmp_path)
    assert Lineage.load(tmp_path) == LINEAGE
    assert [p.name for p in tmp_path.iterdir()] == ["lineage.json"]
    assert LINEAGE.parent == PARENT and Lineage().parent is None


def test_a_stage_in_progress_is_brought_up_to_date_and_a_new_one_added() -> None:
    further = Stage("code", "run", "/runs/code", 1e-5, 900, (domain("python", 900),))
    assert LINEAGE.extended(further).stages == (GRANDPARENT, further)
    child = Stage("child", "run", "/runs/child")
    assert LINEAGE.extended(child).stages == (GRANDPARENT, PARENT, child)


def test_one_content_counts_once_over_all_ancestors() -> None:
    assert [(d.name, d.tokens, d.windows) for d in LINEAGE.domains()] == [("python", 240, 30), ("prose", 960, 120)]


def test_a_huggingface_folder_is_an_ancestor_without_domains(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    lineage = Lineage.load(tmp_path)
    assert [(s.kind, s.path, s.domains) for s in lineage.stages] == [("huggingface", str(tmp_path.resolve()), ())]
    assert lineage.domains() == []


def test_other_folders_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run"):
        Lineage.load(tmp_path)
    for text in ("{", '{"format": 1}', '{"format": 1, "stages": [{"name": "x", "domains": []}]}'):
        (tmp_path / "lineage.json").write_text(text)
        with pytest.raises(UserError, match="cannot be read"):
            Lineage.load(tmp_path)
    (tmp_path / "lineage.json").write_text(json.dumps({"format": 9, "stages": []}))
    with pytest.raises(UserError, match="format 9"):
        Lineage.load(tmp_path)


def test_all_domains_are_replayed_by_their_tokens() -> None:
    assert names(ReplayConfig(fraction=0.1)) == {"python": 240, "prose": 960}


def test_named_domains_are_replayed_as_told() -> None:
    assert names(ReplayConfig(fraction=0.1, domains={"prose": 2.0, "python": 0.0})) == {"prose": 2.0}


def test_what_is_trained_on_anyway_is_not_replayed() -> None:
    assert names(ReplayConfig(fraction=0.1), {"snakes": "hash of python"}) == {"prose": 960}
    with pytest.raises(UserError, match="content is that of the new domain 'snakes'"):
        names(ReplayConfig(fraction=0.1, domains={"python": 1}), {"snakes": "hash of python"})


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UserError, match=r"replay.domains names 'pyton'(.|\n)*did you mean 'python'"):
        names(ReplayConfig(fraction=0.1, domains={"pyton": 1}))
    with pytest.raises(UserError, match=r"replay.paths names 'zzz'"):
        names(ReplayConfig(fraction=0.1, paths={"zzz": "/x"}))


def test_a_clash_of_names_is_refused() -> None:
    with pytest.raises(UserError, match="'python' of the lineage and the new domain of that name"):
        names(ReplayConfig(fraction=0.1), {"python": "other content"})


def test_moved_and_changed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DISK, "/data/python")
    with pytest.raises(
        UserError, match=r"'python' of the lineage is not at /data/python(.|\n)*set replay.paths.python"
    ):
        names(ReplayConfig(fraction=0.1))
    monkeypatch.setitem(DISK, "/moved/python", "hash of python")
    found = resolve_replay(LINEAGE, ReplayConfig(fraction=0.1, paths={"python": "/moved/python"}), {}, fingerprint)
    assert found[0].path == "/moved/python"
    monkeypatch.setitem(DISK, "/moved/python", "something else")
    with pytest.raises(UserError, match="content of domain 'python' at /moved/python changed"):
        names(ReplayConfig(fraction=0.1, paths={"python": "/moved/python"}))


def measured(loss: float | None, on: str = "w", windows: int = 8) -> ConsumedDomain:
    return replace(domain("english", 64), windows=windows, held_out_loss=loss, measured_on=on)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([[measured(2.0)], []], 2.0),  # learned in the first stage, not seen in the second: 2.5 is what is left of it
        ([[measured(2.0)], [measured(2.2)]], 2.0),  # replayed in the second: the best counts
        ([[measured(3.0)], [measured(2.2)]], 2.2),
        ([[measured(None)]], 2.5),  # nothing written down, but the stage before this one ended with what it began with
        ([[measured(9.0)]], 2.5),  # its last evaluation was long before its end
        ([[measured(None)], []], None),
        ([[measured(2.0, on="others")], []], None),
        ([[measured(2.0, windows=0)], [measured(2.4)]], 2.4),
        ([[], []], None),
    ],
)
def test_forgetting_is_counted_from_the_best_end_of_a_stage(
    stages: list[list[ConsumedDomain]], expected: float | None
) -> None:
    lineage = Lineage(tuple(Stage(str(n), "run", f"/{n}", domains=tuple(d)) for n, d in enumerate(stages)))
    assert lineage.loss_when_learned("hash of english", "w", 2.5) == expected


def test_losses_go_through_the_file_and_are_unknown_in_older_ones(tmp_path: Path) -> None:
    lineage = Lineage((replace(GRANDPARENT, domains=(measured(2.0),)),))
    lineage.save(tmp_path)
    assert Lineage.load(tmp_path) == lineage
    values = json.loads((tmp_path / "lineage.json").read_text())
    for name in ("held_out_loss", "measured_on"):
        del values["stages"][0]["domains"][0][name]
    (tmp_path / "lineage.json").write_text(json.dumps(values))
    assert Lineage.load(tmp_path).stages[0].domains[0].held_out_loss is None

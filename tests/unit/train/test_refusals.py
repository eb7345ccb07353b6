"""A refused start leaves the run folder as it was, names and bytes; what is damaged or lost is said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rewarm.config.load import load
from rewarm.config.run import RunConfig
from rewarm.errors import UserError
from rewarm.launch.records import new_submission, record, write_jobs
from rewarm.resilience.owner import Owner
from rewarm.train import session
from rewarm.train.parent import find_parent
from rewarm.train.stage import resolve_stage
from saved_runs import digest, flip, unpack_runs

RUN = Path("runs/continue")
STEP = RUN / "checkpoints/step-4"


class EngineOfOne:
    """A single rank without a model: what is refused before the first step needs none."""

    rank = 0
    world_size = 1
    is_main = True
    data_parallel_rank = 0
    data_parallel_size = 1
    refuses: str | None = None

    def barrier(self) -> None: ...

    def close(self) -> None: ...

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def parameter_count(self) -> int:
        return 1

    def load(self, folder: Path, *, optimizer: bool) -> None:
        if self.refuses:
            raise UserError(self.refuses)

    def set_rng_state(self, state: Any) -> None: ...


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The runs of an earlier version, to work in, with an engine that has no model."""
    unpack_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rewarm.engine.build.build_engine", lambda *args: EngineOfOne())
    monkeypatch.setattr(session, "train", lambda run: run.feed.close())
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path


def stage(*overrides: str) -> RunConfig:
    """The stage that was begun with the archive, whose lineage remembers another place of the replayed domain."""
    return load("continue.yaml", ["replay.paths.counting=counting", *overrides])


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def later_weights(text: str) -> str:
    line = json.loads(text.splitlines()[0])
    return json.dumps(line) + "\n" + json.dumps(line | {"sample": 30}) + "\n"


def own_the_run() -> None:
    (RUN / "lock").mkdir()
    (RUN / "lock/000001.json").write_text(json.dumps({**Owner.this_process().to_dict(), "released": False}))


RESUMES: dict[str, tuple[Callable[[], Any], list[str], str]] = {
    "another rate": (lambda: None, ["schedule.peak=1"], "schedule.peak"),
    "another seed": (lambda: None, ["seed=7"], "seed=1234"),
    "another engine": (lambda: None, ["engine=deepspeed"], "engine=megatron"),
    "a layout that does not fit": (lambda: None, ["parallel.tensor=3"], "parallel.tensor=3"),
    "ranks that are not there": (lambda: None, ["parallel.data=2"], "ranks"),
    "data that is gone": (lambda: Path("threes.bin").unlink(), [], "threes"),
    "data that changed": (lambda: flip(Path("threes.bin"), 0.0), [], "'threes' changed"),
    "replayed data that changed": (lambda: flip(Path("counting.bin"), 0.0), [], "counting"),
    "no config.yaml": (lambda: (RUN / "config.yaml").unlink(), [], "config.yaml is gone"),
    "a damaged config.yaml": (lambda: (RUN / "config.yaml").write_bytes(b"a: [\xff"), [], "config.yaml is damaged"),
    "an empty config.yaml": (lambda: (RUN / "config.yaml").write_text(""), [], "config.yaml is damaged"),
    "no weight log": (lambda: (RUN / "mixture.jsonl").unlink(), [], "weight log"),
    "a damaged weight log": (lambda: flip(RUN / "mixture.jsonl", 0.0), [], "mixture.jsonl:1"),
    "damaged tensors alone": (lambda: flip(STEP / "model/__0_0.distcp"), [], "every checkpoint"),
    "a damaged state": (lambda: flip(STEP / "state.json"), [], "every checkpoint"),
    "a damaged lineage": (lambda: flip(STEP / "lineage.json"), [], "every checkpoint"),
    "no manifest": (lambda: (STEP / "manifest.json").unlink(), [], "every checkpoint"),
    "a manifest of nothing": (lambda: (STEP / "manifest.json").write_text("[]"), [], "every checkpoint"),
    "checkpoints moved away": (lambda: shutil.move(RUN / "checkpoints", "elsewhere"), [], "saved some"),
    "a checkpoint removed": (lambda: shutil.rmtree(STEP), [], "saved some"),
    "an owner that lives": (own_the_run, [], "is being trained by"),
    "a weight log of another run": (
        lambda: edit(RUN / "mixture.jsonl", lambda text: text.replace("3221225472", "2147483648", 1)), [],
        "mixture.jsonl:1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", RESUMES)
def test_a_refused_resume_leaves_the_folder_as_it_was(place: Path, reason: str) -> None:
    spoil, overrides, message = RESUMES[reason]
    spoil()
    before = digest(place)
    with pytest.raises(UserError, match=message) as caught:
        session.run_session(stage(*overrides))
    assert caught.value.fix
    assert digest(place) == before


def test_what_the_engine_refuses_comes_before_the_first_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineOfOne, "refuses", "the checkpoint holds another model")
    before = digest(place)
    with pytest.raises(UserError, match="holds another model"):
        session.run_session(stage("checkpoint.keep=3"))
    assert digest(place) == before


def test_a_session_that_nothing_refuses_writes(place: Path) -> None:
    """The same with nothing wrong, so that the others fail for their reason."""
    session.run_session(stage("checkpoint.keep=3"))
    assert yaml.safe_load((RUN / "config.yaml").read_text())["checkpoint"]["keep"] == 3
    assert "started" in (RUN / "logs/rank-0.log").read_text()


CHILDREN: dict[str, tuple[Callable[[], Any], str]] = {
    "tensors": (lambda: flip(Path("runs/base/checkpoints/step-8/model/__0_0.distcp")), "__0_0.distcp has changed"),
    "state": (lambda: flip(Path("runs/base/checkpoints/step-8/state.json")), "state.json has changed"),
    "lineage": (lambda: flip(Path("runs/base/checkpoints/step-8/lineage.json")), "lineage.json has changed"),
    "a part": (lambda: Path("runs/base/checkpoints/step-8/model/common.pt").unlink(), "common.pt is missing"),
}


@pytest.mark.parametrize("damage", CHILDREN)
@pytest.mark.parametrize("older", [False, True])
def test_a_damaged_parent_is_refused_and_an_older_checkpoint_is_not_taken_unasked(
    place: Path, damage: str, older: bool
) -> None:
    if older:
        shutil.copytree("runs/base/checkpoints/step-8", "runs/base/checkpoints/step-6")
    spoil, message = CHILDREN[damage]
    spoil()
    before = digest(place)
    with pytest.raises(UserError, match=message) as caught:
        session.run_session(stage("name=child"))
    assert digest(place) == before, "not even an empty folder"
    assert caught.value.fix
    if older and damage != "tensors":
        assert "runs/base/checkpoints/step-6" in caught.value.fix
        assert find_parent("runs/base/checkpoints/step-6").checkpoint == Path("runs/base/checkpoints/step-6")


def test_a_parent_whose_latest_checkpoint_was_taken_away_is_refused(place: Path) -> None:
    shutil.copytree("runs/base/checkpoints/step-8", "runs/base/checkpoints/step-6")
    shutil.move("runs/base/checkpoints/step-8", "milestone")
    with pytest.raises(UserError, match=r"step-8, which checkpoints/latest names(.|\n)*step-6"):
        find_parent("runs/base")


def test_milestones_are_parents_wherever_they_lie(place: Path) -> None:
    """Copied, renamed, linked, or in a linked run; a link leads back to the run with its tokenizer."""
    shutil.copytree("runs/base/checkpoints/step-8", "archive/my-best")
    Path("best").symlink_to("runs/base/checkpoints/step-8")
    Path("linked").symlink_to("runs/base")
    expected = find_parent("runs/base")
    for path in ("archive/my-best", "best", "linked", "linked/checkpoints/step-8", "runs/base/checkpoints/step-8"):
        found = find_parent(path)
        assert found.architecture == expected.architecture and found.lineage == expected.lineage, path
    assert find_parent("best").folder.resolve() == Path("runs/base").resolve()
    assert find_parent("archive/my-best").folder == Path("archive/my-best")
    messages = resolve_stage(stage("name=child", "parent=archive/my-best"), 1).messages
    assert any("lies outside of its run" in message for message in messages)
    session.run_session(stage("name=child", "parent=archive/my-best"))


@pytest.mark.parametrize(
    ("path", "spoil", "message"),
    [
        ("copy", lambda: Path("copy/manifest.json").unlink(), "no manifest.json"),
        ("copy", lambda: Path("copy/model/.metadata").unlink(), r"\.metadata is missing(.|\n)*hidden"),
        ("copy/model", lambda: None, r"part of a checkpoint(.|\n)*parent=copy"),
        ("runs/base/checkpoints", lambda: None, r"folder of checkpoints(.|\n)*step-8"),
        ("runs/base/logs", lambda: None, "neither a run"),
    ],
)
def test_why_a_copy_is_no_parent(place: Path, path: str, spoil: Callable[[], None], message: str) -> None:
    shutil.copytree("runs/base/checkpoints/step-8", "copy")
    spoil()
    with pytest.raises(UserError, match=message):
        find_parent(path)


def test_a_run_that_never_saved_may_begin_again(place: Path) -> None:
    """It was killed before its first checkpoint: metrics, but nothing to go on from."""
    session.run_session(stage("name=child"))
    Path("runs/child/metrics.jsonl").write_text('{"step": 1}\n')
    session.run_session(stage("name=child"))
    assert Path("runs/child/metrics.jsonl").read_text() == ""


def test_a_run_in_the_folder_of_an_ancestor_does_not_erase_it(place: Path) -> None:
    """The parent is moved away and the stage takes its name and path."""
    shutil.move("runs/base", "runs/old")
    lineage = Path("runs/old/checkpoints/step-8/lineage.json").read_text()
    config = stage("name=base", "parent=runs/old")
    assert json.loads(lineage)["stages"][0]["path"] == "/srv/example/runs/base"
    here = str(Path("runs/base").resolve())
    for file in Path("runs/old").rglob("lineage.json"):
        edit(file, lambda text: text.replace("/srv/example/runs/base", here))
    manifest = Path("runs/old/checkpoints/step-8/manifest.json")
    content = json.loads(manifest.read_text())
    from rewarm.checkpoint.store import digest_files

    content["files"] |= digest_files(manifest.parent, ["lineage.json"])
    manifest.write_text(json.dumps(content))
    session.run_session(config)
    stages = json.loads(Path("runs/base/lineage.json").read_text())["stages"]
    assert [stage["path"] for stage in stages] == [here, here]
    assert stages[0]["tokens"] == 256 and stages[1]["tokens"] == 0
    assert stages[1]["id"] and stages[0]["id"] != stages[1]["id"]


def test_what_a_run_begins_with_is_synced_and_so_are_its_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure right after the first step must not leave a run without its configuration or weight log."""
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    session.run_session(stage("name=child"))
    write_jobs(new_submission(place / "runs/child"), ["17"])
    record(place / "runs/child", {"event": "begin"})
    run = str((place / "runs/child").resolve())
    for name in (".config.yaml.new", ".lineage.json.new", ".status.json.new", "mixture.jsonl"):
        assert f"{run}/{name}" in synced, name
        after = synced[synced.index(f"{run}/{name}") :]
        assert run in after, f"the name of {name}"
    for folder in (run, f"{run}/slurm", f"{run}/slurm/001", str(place.resolve() / "runs")):
        assert folder in synced
    assert f"{run}/slurm/001/.jobs.json.new" in synced

"""A damaged file of a run is named, or passed over where it only informs: never a stack trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rewarm.checkpoint import store
from rewarm.checkpoint.distributed import read_state
from rewarm.cli.main import app
from rewarm.config.saved import read_saved, saved_setting
from rewarm.engine.deepspeed.checkpoint import Checkpoint
from rewarm.errors import UserError
from rewarm.launch.records import attempts, read_jobs
from rewarm.replay.lineage import Lineage
from rewarm.resilience.status import read_status
from rewarm.train.open import open_model
from rewarm.train.origin import find_origin
from rewarm.train.state import check_weight_log, read_run_state
from saved_runs import digest, unpack_runs

CONTENTS = [b"", b"\xff\xfe\x00", b"\x00" * 40, b"{", b"[1, 2]", b"null", b"7", b'"text"', b"[" * 100_000, b"{}"]
RUN, STEP = "runs/continue", "runs/continue/checkpoints/step-4"
NAMED: dict[str, Callable[[Path], Any]] = {
    f"{RUN}/config.yaml": lambda place: saved_setting(place / RUN, "optimizer.name"),
    f"{STEP}/state.json": lambda place: read_run_state(place / STEP),
    f"{STEP}/lineage.json": lambda place: Lineage.load(place / STEP),
    "runs/zero/checkpoints/step-4/model/index.json": lambda place: Checkpoint(
        place / "runs/zero/checkpoints/step-4/model"
    ),
}
INFORMING: dict[str, Callable[[Path], Any]] = {
    f"{RUN}/status.json": lambda place: read_status(place / RUN),
    f"{RUN}/slurm/attempts.jsonl": lambda place: attempts(place / RUN),
    f"{RUN}/slurm/001/jobs.json": lambda place: read_jobs(place / RUN / "slurm/001"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(unpack_runs(tmp_path))
    return tmp_path


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", NAMED)
def test_what_decides_is_named_when_it_is_damaged(place: Path, name: str, content: bytes) -> None:
    NAMED[name](place)
    (place / name).write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml|state\.json|lineage\.json|deepspeed engine") as caught:
        NAMED[name](place)
    assert caught.value.fix


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", INFORMING)
def test_what_informs_is_passed_over_when_it_is_damaged(place: Path, name: str, content: bytes) -> None:
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(content)
    assert not INFORMING[name](place)


@pytest.mark.parametrize(
    "manifest",
    [
        *CONTENTS,
        json.dumps({"format": 1, "files": {}}).encode(),
        json.dumps({"format": 1, "files": {"state.json": 3}}).encode(),
        json.dumps({"format": 1, "files": {"state.json": {"bytes": 1, "blake2b": "x"}, "../x": {}}}).encode(),
    ],
)
def test_a_damaged_manifest_is_a_damaged_checkpoint(place: Path, manifest: bytes) -> None:
    (place / STEP / "manifest.json").write_bytes(manifest)
    with pytest.raises(store.DamagedCheckpoint, match=r"step-4.*manifest\.json"):
        store.read_manifest(place / STEP)
    with pytest.raises(UserError, match="manifest"):
        open_model(RUN)


@pytest.mark.parametrize(
    "change", [{"domains": 3}, {"path": None}, {"tokens": "x"}, {"tokens": -1}, {"tokens": True}, {"surplus": 1}]
)
def test_values_of_other_types_in_a_lineage_are_named(place: Path, change: dict[str, Any]) -> None:
    file = place / STEP / "lineage.json"
    value = json.loads(file.read_text())
    value["stages"][0] |= change
    file.write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"lineage\.json cannot be read"):
        Lineage.load(file.parent)


@pytest.mark.parametrize("command", [["status", RUN], ["mixture", "audit", RUN], ["mixture", "average", RUN]])
@pytest.mark.parametrize("content", [b"\xff", b"[", b"{}"])
def test_reading_commands_neither_crash_nor_write(place: Path, command: list[str], content: bytes) -> None:
    """A live run's weight log has a line that is just being written; the other files are damaged, or whole."""
    with open(place / RUN / "mixture.jsonl", "ab") as file:
        file.write(b'{"sample": 1')
    before = digest(place)
    CliRunner().invoke(app, command)
    assert digest(place) == before
    for name in ("config.yaml", "status.json", "lineage.json", "checkpoints/step-4/state.json", "metrics.jsonl"):
        whole = (place / RUN / name).read_bytes()
        (place / RUN / name).write_bytes(content)
        before = digest(place)
        result = CliRunner().invoke(app, command)
        assert result.exception is None or isinstance(result.exception, UserError | SystemExit), result.exception
        assert digest(place) == before
        (place / RUN / name).write_bytes(whole)


def test_a_weight_log_that_changed_since_the_checkpoint_is_refused(place: Path) -> None:
    log = place / RUN / "mixture.jsonl"
    state = read_state(place / STEP)
    check_weight_log(place / RUN, state)  # of a version that did not write it down
    content = log.read_bytes()
    state["weight_log"] = {
        "bytes": len(content),
        "blake2b": store.digest_files(log.parent, [log.name])[log.name]["blake2b"],
    }
    check_weight_log(place / RUN, state)
    log.write_bytes(content + b'{"sample": 90}\n')
    check_weight_log(place / RUN, state)  # what came after the checkpoint is read, and not compared
    for changed in (content.replace(b'"sample": 0', b'"sample": 1'), content[:-3]):
        log.write_bytes(changed)
        with pytest.raises(UserError, match="is not what it was at step 4"):
            check_weight_log(place / RUN, state)


def test_a_run_keeps_its_identity_where_it_has_one_and_an_old_one_gets_its_own(place: Path) -> None:
    from rewarm.config.load import load

    first = find_origin(load("continue.yaml"))
    assert first.run_id == find_origin(load("continue.yaml")).run_id == Lineage.load(STEP).stages[-1].identity
    assert first.lineage.stages[0].identity != first.run_id
    fresh = load("continue.yaml", ["name=child"])
    assert find_origin(fresh).run_id != find_origin(fresh).run_id, "drawn when a run starts"
    assert len({stage.identity for stage in Lineage.load(STEP).stages}) == 2
    assert read_saved(place / RUN)["name"] == "continue"

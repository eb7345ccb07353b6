"""wandb for real, offline: what its file holds after a run, a kill and a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import rewarm
from patience import PATIENCE
from rewarm.config.training import WandbConfig
from rewarm.tracking.wandb import WandbWriter, find_key, resolve_mode
from wandb_files import read_history


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def history(folder: Path) -> list[dict[str, Any]]:
    """What a later process would find: at the end of this one the service writes what it still holds."""
    import wandb

    wandb.teardown()
    return read_history(folder)


def writer(
    folder: Path, resumed: bool, said: list[str], backlog: Sequence[tuple[int, dict[str, float]]] = (), **values: Any
) -> WandbWriter:
    folder.mkdir(exist_ok=True)
    config = WandbConfig(**{"mode": "offline", **values})
    return WandbWriter(folder, config, {"seed": 7}, resumed, said.append, lambda: backlog)


def test_a_resumed_run_is_the_same_wandb_run_and_no_step_comes_twice(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said: list[str] = []
    first = writer(folder, False, said)
    first.log(0, {"held_out_loss/english": 9.0})
    for step in range(1, 6):
        first.log(step, {"loss": 5.0 / step})
    first.log(5, {"held_out_loss/english": 2.0})
    first.close(0)
    number = json.loads((folder / "wandb.json").read_text())["id"]

    time.sleep(1.1)  # wandb names a segment by the second
    second = writer(folder, True, said)  # from a checkpoint at step 3: 4 and 5 are trained again
    for step in range(4, 9):
        second.log(step, {"loss": 5.0 / step})
    second.close(0)

    assert json.loads((folder / "wandb.json").read_text()) == {"id": number, "last_step": 8}
    assert [path.name.rsplit("-")[-1] for path in folder.glob("wandb/offline-run-*")] == [number, number]
    rows = history(folder)
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["loss"] for row in rows[1:]] == [5.0 / step for step in range(1, 9)]
    assert rows[5]["held_out_loss/english"] == 2.0
    assert not [text for text in said if "warning" in text]


def test_what_a_kill_took_is_sent_by_the_next_run(tmp_path: Path) -> None:
    """wandb has steps 0 to 3, the run's files have steps 0 to 6."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "wandb.json").write_text('{"id": "abcdef12", "last_step": 3}')
    lines: list[tuple[int, dict[str, float]]] = [(0, {"held_out_loss/english": 9.0})]
    lines += [(step, {"loss": 5.0 / step}) for step in range(1, 7)]
    lines += [(6, {"held_out_loss/english": 2.0})]
    resumed = writer(folder, True, [], lines)
    resumed.log(7, {"loss": 5.0 / 7})
    resumed.close(0)
    rows = history(folder)
    assert [(row["_step"], row["loss"]) for row in rows] == [(step, 5.0 / step) for step in (4, 5, 6, 7)]
    assert rows[2]["held_out_loss/english"] == 2.0
    assert json.loads((folder / "wandb.json").read_text()) == {"id": "abcdef12", "last_step": 7}


def test_only_what_wandb_has_had_time_to_write_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewarm.tracking.wandb.REMEMBER_EVERY", 0.2)
    run = writer(tmp_path / "run", False, [])

    def noted() -> int:
        path = tmp_path / "run" / "wandb.json"
        return int(json.loads(path.read_text())["last_step"]) if path.exists() else -1

    step, last = 0, 0
    handed = {-1: 0.0}
    deadline = time.monotonic() + PATIENCE
    while last <= 4 and time.monotonic() < deadline:
        step += 1
        handed[step] = time.monotonic()
        run.log(step, {"loss": 1.0})
        time.sleep(0.05)
        if (now := noted()) > last:
            assert time.monotonic() - handed[now] >= 0.2  # handed over before the note before
            last = now
    assert last > 4
    run.close(0)
    assert noted() == step


def test_a_run_that_begins_anew_is_another_wandb_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb.json").write_text('{"id": "abcdef12", "last_step": 40}')
    again = writer(tmp_path / "run", False, [])
    again.log(1, {"loss": 1.0})
    again.close(0)
    assert json.loads((tmp_path / "run" / "wandb.json").read_text())["id"] != "abcdef12"
    assert [row["_step"] for row in history(tmp_path / "run")] == [1]


def test_failures_are_told_once_and_never_raised(tmp_path: Path) -> None:
    said: list[str] = []
    broken = writer(tmp_path / "run", False, said)
    (tmp_path / "run" / "wandb.json").mkdir()  # nothing can be kept there
    for step in range(1, 4):
        broken.log(step, {"loss": 1.0})
        time.sleep(0.05)
    broken.close(0)
    assert len(said) == 1 and said[0].startswith("warning: wandb stopped recording")


def test_an_unreachable_server_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port, which nobody listens to
    monkeypatch.setattr("rewarm.tracking.wandb.INIT_TIMEOUT", 2.0)
    said: list[str] = []
    run = writer(tmp_path / "run", False, said, mode="auto")
    run.log(1, {"loss": 1.0})
    run.log(2, {"loss": 0.5})
    run.close(0)
    assert "cannot be reached" in said[0] and "offline" in said[1] and len(said) == 2
    rows = [row for row in history(tmp_path / "run") if "loss" in row]
    assert [(row["_step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5)]


def test_nothing_is_started_before_the_first_step() -> None:
    """The writer, an evaluation at step 0 and a close must not import wandb; a metrics line must not wait for it."""
    code = (
        "import sys, pathlib, tempfile\n"
        "from rewarm.config.training import WandbConfig\n"
        "from rewarm.tracking.wandb import WandbWriter\n"
        "writer = WandbWriter(pathlib.Path(tempfile.mkdtemp()), WandbConfig(mode='offline'), {}, False, print)\n"
        "writer.log(0, {'loss': 1.0})\n"
        "writer.close(0)\n"
        "sys.exit('wandb' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(rewarm.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=PATIENCE, env=environment).returncode == 0


def test_mode_by_key_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    auto = WandbConfig()
    assert find_key() is None and resolve_mode(auto) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    assert find_key() == str(tmp_path / "netrc") and resolve_mode(auto) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert find_key() is None and resolve_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert find_key() == "WANDB_API_KEY" and resolve_mode(auto) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode(auto) == "disabled"
    assert resolve_mode(WandbConfig(mode="offline")) == "offline"


def test_own_server_from_the_settings_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wandb-config").mkdir()
    (tmp_path / "wandb-config" / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password 0123456789\n")
    assert find_key() == str(tmp_path / "netrc")

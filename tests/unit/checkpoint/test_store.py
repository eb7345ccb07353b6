"""A checkpoint is visible only when whole, and a damaged one is named."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from rewarm.checkpoint import store


def write(folder: Path, step: int, size: int = 1000) -> Path:
    partial = store.begin(folder, step)
    (partial / "model").mkdir()
    (partial / "model" / "shard.bin").write_bytes(random.Random(step).randbytes(size))
    (partial / "state.json").write_text(f'{{"step": {step}}}')
    return store.commit(partial, step, store.digest_files(partial, store.content_files(partial), sync=True))


def test_committed_checkpoint_is_listed_verified_and_latest(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        write(tmp_path, step)
    assert [store.step_of(path) for path in store.list_checkpoints(tmp_path)] == [100, 10, 5]
    assert (tmp_path / "latest").read_text() == "step-100\n"
    for path in store.list_checkpoints(tmp_path):
        store.verify(path)


def test_partial_checkpoint_is_not_listed_and_is_cleared_by_the_next(tmp_path: Path) -> None:
    partial = store.begin(tmp_path, 7)
    (partial / "half").write_text("x")
    assert store.list_checkpoints(tmp_path) == []
    write(tmp_path, 8)
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    checkpoint = write(tmp_path, 3)
    shard = checkpoint / "model" / "shard.bin"
    data = shard.read_bytes()
    if damage == "truncate":
        shard.write_bytes(data[:-1])
    elif damage == "flip":
        shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "remove":
        shard.unlink()
    else:
        (checkpoint / store.MANIFEST).write_text("{")
    with pytest.raises(store.DamagedCheckpoint, match=r"manifest\.json" if damage == "manifest" else "shard"):
        store.verify(checkpoint)


def test_prune_keeps_the_newest_and_spares_later_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    removed = store.prune(tmp_path, 2, current=tmp_path / "step-3")
    assert [path.name for path in removed] == ["step-1"]
    assert [path.name for path in store.list_checkpoints(tmp_path)] == ["step-4", "step-3", "step-2"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 4)
    (checkpoint / "model" / "shard.bin").write_bytes(b"")
    store.verify(write(tmp_path, 4))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_killed_at_any_moment_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    """A child saves and prunes without pause and is killed; whatever is listed must verify, and latest must exist."""
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        child = os.fork()
        if child == 0:
            for step in range(1, 10_000):
                current = write(folder, step, size=200_000)
                store.prune(folder, 2, current=current)
            os._exit(0)
        time.sleep(0.02 + 0.013 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        listed = store.list_checkpoints(folder)
        for path in listed:
            store.verify(path)
        if (folder / "latest").exists():
            store.verify(folder / (folder / "latest").read_text().strip())
        write(folder, 99_999)
        assert not [path for path in folder.iterdir() if path.name.startswith(".partial")]

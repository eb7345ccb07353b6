"""Saving on several ranks, here threads: each hashes its share, and an error on one reaches all."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE
from rewarm.checkpoint import store
from rewarm.checkpoint.distributed import find_checkpoint, read_state, save_checkpoint
from rewarm.errors import UserError


class ThreadGroup:
    """Collectives between threads."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.world_size = rank, world_size
        self._barrier, self._slots = barrier, slots

    def barrier(self) -> None:
        self._barrier.wait(PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self.barrier()
        values = list(self._slots)
        self.barrier()
        return values

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def on_ranks(world_size: int, action: Callable[[ThreadGroup], Any]) -> list[Any]:
    barrier, slots = threading.Barrier(world_size), [None] * world_size
    results: list[Any] = [None] * world_size

    def work(rank: int) -> None:
        try:
            results[rank] = action(ThreadGroup(rank, world_size, barrier, slots))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


FULL = OSError(errno.ENOSPC, "No space left on device")


def save(
    group: ThreadGroup, folder: Path, step: int, fail_on: int | None = None, prepare_error: Exception | None = None
) -> Path:
    def prepare(partial: Path) -> None:
        if prepare_error is not None:
            raise prepare_error
        (partial / "folder").mkdir()

    def write(partial: Path) -> None:
        if group.rank == fail_on:
            raise FULL
        assert (partial / "folder").is_dir()
        (partial / f"shard-{group.rank}").write_bytes(bytes([group.rank]) * 100)
        group.barrier() if fail_on is None else None

    return save_checkpoint(group, folder, step, prepare, write, {"step": step}, keep=2)


@pytest.mark.parametrize("world_size", [1, 3])
def test_saved_by_some_ranks_and_found_by_others(tmp_path: Path, world_size: int) -> None:
    for step in (1, 2, 3):
        on_ranks(world_size, lambda group, step=step: save(group, tmp_path, step))
    names = set(store.read_manifest(tmp_path / "step-3"))
    assert names == {"state.json", *(f"shard-{rank}" for rank in range(world_size))}
    found = on_ranks(2, lambda group: find_checkpoint(group, tmp_path, print))
    assert found == [tmp_path / "step-3"] * 2
    assert read_state(found[0]) == {"step": 3}
    assert not (tmp_path / "step-1").exists()


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_loses_nothing(tmp_path: Path) -> None:
    on_ranks(3, lambda group: save(group, tmp_path, 1))
    errors = on_ranks(3, lambda group: save(group, tmp_path, 2, fail_on=1))
    assert all(isinstance(error, UserError) and "No space left" in str(error) for error in errors)
    assert on_ranks(1, lambda group: find_checkpoint(group, tmp_path, print)) == [tmp_path / "step-1"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("error", [FULL, UserError("cannot write lineage.json: No space left on device")])
def test_a_full_disk_before_the_ranks_write_leaves_none_waiting(tmp_path: Path, error: Exception) -> None:
    on_ranks(3, lambda group: save(group, tmp_path, 1))
    errors = on_ranks(3, lambda group: save(group, tmp_path, 2, prepare_error=error))
    assert all(isinstance(error, UserError) and "No space left" in str(error) for error in errors), errors
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_state_that_cannot_be_written_is_an_error_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text

    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        if path.name == "state.json":
            raise FULL
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    errors = on_ranks(3, lambda group: save(group, tmp_path, 1))
    assert all(isinstance(error, UserError) and "No space left" in str(error) for error in errors), errors


def test_every_file_is_in_the_manifest_though_ranks_list_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached listing on a shared file system lacks what other nodes wrote last."""
    listing = store.content_files
    calls = iter(range(100))
    monkeypatch.setattr(store, "content_files", lambda folder: listing(folder)[next(calls) % 3 :])
    on_ranks(3, lambda group: save(group, tmp_path, 1))
    assert set(store.read_manifest(tmp_path / "step-1")) == set(listing(tmp_path / "step-1"))


def test_a_damaged_checkpoint_is_named_and_stepped_over(tmp_path: Path) -> None:
    for step in (1, 2):
        on_ranks(1, lambda group, step=step: save(group, tmp_path, step))
    (tmp_path / "step-2" / "shard-0").write_bytes(b"\x01" + b"\x00" * 99)
    told: list[str] = []
    assert on_ranks(2, lambda group: find_checkpoint(group, tmp_path, told.append)) == [tmp_path / "step-1"] * 2
    assert "step-2" in told[0] and "shard-0" in told[0]
    (tmp_path / "step-1" / "manifest.json").unlink()
    assert isinstance(on_ranks(1, lambda group: find_checkpoint(group, tmp_path, told.append))[0], UserError)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert on_ranks(1, lambda group: find_checkpoint(group, tmp_path / "none", print)) == [None]

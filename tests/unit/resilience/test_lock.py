"""One live owner of a run folder, whatever died before."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from patience import PATIENCE
from rewarm.errors import UserError
from rewarm.resilience import lock as lock_module
from rewarm.resilience.lock import STALE_SECONDS, RunLock, find_owner
from rewarm.resilience.owner import Owner
from saved_runs import digest

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)


def hold(run: Path, ready: multiprocessing.synchronize.Event) -> None:
    RunLock(run)
    ready.set()
    time.sleep(PATIENCE)


def start_holder(run: Path) -> multiprocessing.process.BaseProcess:
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(run, ready), daemon=True)
    process.start()
    assert ready.wait(PATIENCE)
    return process


def write_owner(run: Path, owner: Owner, number: int = 1, age: float = 0.0) -> Path:
    path = run / "lock" / f"{number:06d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**owner.to_dict(), "released": False}))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def elsewhere(**changes: object) -> Owner:
    values = {"host": "far", "user": "u", "pid": 1, "started": 1, "kernel": "another", "since": 0.0}
    return Owner(**{**values, **changes})  # type: ignore[arg-type]


def test_a_second_process_is_refused_and_told_who_owns_the_run(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    try:
        with pytest.raises(UserError, match=f"is being trained by process {holder.pid} on {socket.gethostname()}"):
            RunLock(tmp_path)
    finally:
        holder.kill()
        holder.join()


def test_a_killed_owner_does_not_count(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    assert find_owner(tmp_path).pid == holder.pid
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert find_owner(tmp_path) is None
    RunLock(tmp_path).release()


def test_another_process_with_the_same_id_does_not_count(tmp_path: Path) -> None:
    mine = Owner.this_process()
    write_owner(tmp_path, Owner(**{**mine.to_dict(), "started": mine.started - 1}))
    assert find_owner(tmp_path) is None


def test_released_is_free_and_numbers_never_fall(tmp_path: Path) -> None:
    numbers = []
    for _ in range(5):
        lock = RunLock(tmp_path)
        numbers.append(int(lock._path.stem))
        lock.release()
        assert find_owner(tmp_path) is None
    assert numbers == [1, 2, 3, 4, 5]
    assert len(list((tmp_path / "lock").iterdir())) <= 3


@pytest.mark.parametrize(("age", "alive"), [(0.0, True), (STALE_SECONDS + 5, False)])
def test_an_owner_that_cannot_be_asked_lives_by_its_heartbeat(tmp_path: Path, age: float, alive: bool) -> None:
    write_owner(tmp_path, elsewhere(), age=age)
    assert (find_owner(tmp_path) is not None) == alive
    if alive:
        with pytest.raises(UserError, match="process 1 on far"):
            RunLock(tmp_path)
    else:
        RunLock(tmp_path).release()


def test_the_heartbeat_keeps_an_owner_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    lock = RunLock(tmp_path)
    os.utime(lock._path, (0, 0))
    deadline = time.monotonic() + PATIENCE
    while lock._path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock._path.stat().st_mtime > 0
    lock.release()


def race(run: Path, start: multiprocessing.synchronize.Event, wins: multiprocessing.queues.Queue) -> None:
    start.wait()
    try:
        RunLock(run)
    except UserError:
        wins.put(0)
    else:
        wins.put(1)
        time.sleep(PATIENCE)


def test_of_many_that_claim_a_stale_lock_at_once_one_wins(tmp_path: Path) -> None:
    write_owner(tmp_path, elsewhere(), number=3, age=STALE_SECONDS + 5)
    start, wins = FORK.Event(), FORK.Queue()
    processes = [FORK.Process(target=race, args=(tmp_path, start, wins), daemon=True) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    assert sum(wins.get(timeout=PATIENCE) for _ in processes) == 1
    for process in processes:
        process.kill()
        process.join()


def attempt(run: Path, number: int, ready: multiprocessing.synchronize.Event) -> None:
    os.environ.update(SLURM_JOB_ID="17", SLURM_RESTART_COUNT=str(number), SLURM_CLUSTER_NAME="c")
    lock_module.BEAT_SECONDS = 0.2
    RunLock(run)
    ready.set()
    time.sleep(PATIENCE)


def test_a_later_attempt_of_the_same_job_takes_over_and_the_earlier_one_ends_itself(tmp_path: Path) -> None:
    """A node that SLURM has lost may still run its ranks."""
    ready = [FORK.Event(), FORK.Event()]
    processes = [FORK.Process(target=attempt, args=(tmp_path, number, ready[number]), daemon=True) for number in (0, 1)]
    processes[0].start()
    assert ready[0].wait(PATIENCE)
    processes[1].start()
    assert ready[1].wait(PATIENCE)
    processes[0].join(20)
    assert processes[0].exitcode == 4 and processes[1].is_alive()
    assert find_owner(tmp_path).attempt == 1
    processes[1].kill()
    processes[1].join()


def test_the_heartbeat_outlives_errors_of_a_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings, the touch, and a listing that lacks the file for a while."""
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.02)
    real_list, real_touch = os.listdir, os.utime
    failures = iter(range(30))

    def listing(path: Path) -> list[str]:
        turn = next(failures, None)
        if turn is None or threading.current_thread() is threading.main_thread():
            return real_list(path)
        if turn % 3 == 2:
            return []
        raise OSError((errno.EIO, errno.ESTALE)[turn % 2], "transient")

    def touch(path: Path, *arguments: object) -> None:
        if next(failures, None) is not None and threading.current_thread() is not threading.main_thread():
            raise OSError(errno.EIO, "transient")
        real_touch(path, *arguments)

    lock = RunLock(tmp_path)
    monkeypatch.setattr(os, "listdir", listing)
    monkeypatch.setattr(os, "utime", touch)
    real_touch(lock._path, (0, 0))
    deadline = time.monotonic() + PATIENCE
    while lock._path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert next(failures, None) is None and lock._path.stat().st_mtime > 0
    lock.check()
    lock.release()


def fail(*_: object) -> None:
    raise OSError(errno.EIO, "gone for good")


def hang(*_: object) -> None:
    time.sleep(3600)


def hold_badly(run: Path, how: str) -> None:
    lock_module.BEAT_SECONDS, lock_module.LEASE_SECONDS = 0.05, 1.0
    RunLock(run)
    if how == "stopped and taken over":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "taken over":
        newest = sorted((run / "lock").glob("*.json"))[-1]
        (run / "lock" / f"{int(newest.stem) + 1:06d}.json").write_text("{}")
    else:
        os.utime = {"fails": fail, "hangs": hang}[how]
    time.sleep(3600)


@pytest.mark.parametrize("how", ["fails", "hangs", "stopped and taken over", "taken over"])
def test_an_owner_that_cannot_renew_ends_itself(tmp_path: Path, how: str) -> None:
    """Its main thread may be anywhere, and the thread that touches the file may hang in it."""
    process = FORK.Process(target=hold_badly, args=(tmp_path, how), daemon=True)
    process.start()
    assert process.pid is not None
    if how == "stopped and taken over":
        while Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "TZ":
            time.sleep(0.05)
        time.sleep(1.1)
        (tmp_path / "lock" / "000002.json").write_text("{}")
        os.kill(process.pid, signal.SIGCONT)
    process.join(120)
    assert process.exitcode == 4


def test_an_owner_that_was_stopped_claims_the_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody took it over meanwhile, which the next number proves."""
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    lock = RunLock(tmp_path)
    lock._renewed -= 2 * lock_module.LEASE_SECONDS
    deadline = time.monotonic() + PATIENCE
    while lock._path.stem == "000001" and time.monotonic() < deadline:
        time.sleep(0.01)
    lock.check()
    assert lock._path.stem == "000002" and find_owner(tmp_path) is not None
    lock.release()
    assert find_owner(tmp_path) is None


def test_there_is_time_between_the_end_of_an_owner_and_its_successor() -> None:
    assert lock_module.LEASE_SECONDS + 6 * lock_module.BEAT_SECONDS < STALE_SECONDS


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": "a"}', b"\xff", b"[" * 100_000])
def test_a_lock_that_cannot_be_read_is_not_free(tmp_path: Path, content: bytes) -> None:
    path = write_owner(tmp_path, elsewhere())
    path.write_bytes(content)
    for look in (find_owner, RunLock):
        with pytest.raises(UserError, match=r"000001.json cannot be read"):
            look(tmp_path)
    os.utime(path, (0, 0))
    assert find_owner(tmp_path) is None
    RunLock(tmp_path).release()


def test_an_earlier_attempt_is_waited_for_though_slurm_counts_it_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node was lost to SLURM, and its ranks run on there."""
    for name, value in {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1", "SLURM_CLUSTER_NAME": "c"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("rewarm.resilience.owner._slurm_says", lambda job, attempt: False)
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    earlier = elsewhere(job="17", cluster="c", attempt=0)
    path = write_owner(tmp_path, earlier)
    released = threading.Event()

    def release() -> None:
        time.sleep(0.5)
        released.set()
        path.write_text(json.dumps({**earlier.to_dict(), "released": True}))

    threading.Thread(target=release).start()
    lock = RunLock(tmp_path)
    assert released.is_set()
    lock.release()


def test_a_lock_that_is_withdrawn_leaves_no_trace(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    RunLock(second).release()
    before = digest(tmp_path)
    for run in (first, second):
        lock = RunLock(run)
        lock.withdraw()
        lock.release()
    assert digest(tmp_path) == before


def test_a_taken_lock_may_not_be_written_under(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.check()
    lock._stop()
    write_owner(tmp_path, elsewhere(), number=2)
    with pytest.raises(UserError, match="may belong to another process"):
        lock.check()

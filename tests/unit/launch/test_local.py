"""Where the ranks of one machine meet, and how the launcher ends them."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rewarm.launch import local
from rewarm.launch.local import free_port

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not RANGE.exists(), reason="no Linux")
def test_a_port_is_free_and_is_given_to_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the system may give to anybody's connection was taken before rank 0 listened on it."""
    first = int(RANGE.read_text().split()[0])
    port = free_port()
    assert 10_000 <= port < first
    with socket.socket() as server:
        server.bind(("", port))
        server.listen()
        draws = iter([port, port, port + 1, *range(port + 2, port + 60)])
        monkeypatch.setattr(random.SystemRandom, "randrange", lambda self, start, stop: next(draws))
        assert free_port() > port


LISTENS = """
import signal, sys, time
seen = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    if sys.argv[1] == "deaf" or number == signal.SIGTERM or sys.argv[1] == "saves":
        signal.signal(number, lambda number, frame: seen.append(number))
print("ready", flush=True)
while sys.argv[1] != "saves" or not seen:
    time.sleep(0.01)
    if sys.argv[1] == "writes" and seen:
        for turn in range(60):
            open(sys.argv[2], "wb").write(bytes(2 << 20))
            time.sleep(0.05)
        sys.exit(0)
"""


def ranks(tmp_path: Path, *kinds: str) -> list[subprocess.Popen[bytes]]:
    """Processes that stand for ranks, each with a child of its own, once they listen."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LISTENS, kind, str(tmp_path / kind)], stdout=subprocess.PIPE, start_new_session=True
        )
        for kind in kinds
    ]
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.stdout.close()
    return started


def waited(children: list[subprocess.Popen[bytes]], *sent: int, pause: float = 0.2, **settings: float) -> local._Ending:
    """What the launcher makes of signals that it is sent while it waits."""

    def send() -> None:
        for number in sent:
            time.sleep(pause)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        return local._wait(children, settings.get("stop_seconds", 600.0))
    finally:
        thread.join()
        assert all(child.poll() is not None for child in children)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_stopped_rank_is_woken_to_save(tmp_path: Path, number: signal.Signals) -> None:
    """A rank under SIGSTOP saw no signal, and the launcher waited for it for ever."""
    children = ranks(tmp_path, "saves", "saves")
    os.kill(children[1].pid, signal.SIGSTOP)
    assert waited(children, number).status == 0


def test_a_rank_that_hangs_is_killed_at_the_second_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.3)
    children = ranks(tmp_path, "saves", "deaf")
    ending = waited(children, signal.SIGTERM, signal.SIGINT, pause=local._IMPATIENT_SECONDS + 0.2)
    assert (ending.status, ending.hanging, ending.asked_by) == (128 + signal.SIGINT, (1,), signal.SIGINT)
    message = local._message(ending, tmp_path, tmp_path)
    assert "SIGINT received, but rank 1 did not end and had to be killed" in message
    assert not os.path.exists(f"/proc/{children[1].pid}")


def test_a_signal_that_arrives_twice_at_once_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that closes reaches the launcher by the kernel and by the shell."""
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.3)
    stop = local._Stop([], 600.0)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        stop.forward(number, None)
        assert not stop.overdue
    clock = time.monotonic() + 2 * local._IMPATIENT_SECONDS
    monkeypatch.setattr(local.time, "monotonic", lambda: clock)
    for number, overdue in ((signal.SIGUSR2, False), (signal.SIGHUP, False), (signal.SIGTERM, True)):
        stop.forward(number, None)
        assert stop.overdue == overdue


def test_a_warning_ahead_of_a_limit_is_no_impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = local._Stop([], 600.0)
    stop.forward(signal.SIGUSR2, None)
    clock = time.monotonic() + 2 * local._IMPATIENT_SECONDS
    monkeypatch.setattr(local.time, "monotonic", lambda: clock)
    stop.forward(signal.SIGTERM, None)
    assert not stop.overdue


def test_ranks_that_neither_end_nor_write_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.3)
    ending = waited(ranks(tmp_path, "deaf"), signal.SIGTERM, stop_seconds=0.3)
    assert (ending.status, ending.hanging) == (128 + signal.SIGTERM, (0,))


def test_a_long_save_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the ranks write, the time without writing does not run out."""
    stop = local._Stop([], 10.0)
    written, clock = 0, time.monotonic()
    monkeypatch.setattr(local._Stop, "_bytes_written", lambda self: written)
    monkeypatch.setattr(local.time, "monotonic", lambda: clock)
    stop.forward(signal.SIGTERM, None)
    for _ in range(10):
        clock += 11.0
        written += 5 << 20
        stop.look()
        assert not stop.overdue
    clock += 11.0
    stop.look()
    assert stop.overdue


def test_the_kernel_counts_what_a_rank_writes(tmp_path: Path) -> None:
    (child,) = ranks(tmp_path, "writes")
    stop = local._Stop([child], 600.0)
    before = stop._bytes_written()
    child.send_signal(signal.SIGTERM)
    while stop._bytes_written() - before < 8 << 20:
        assert child.poll() is None
        time.sleep(0.02)
    child.kill()
    child.wait()


def test_nohup_is_obeyed(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        children = ranks(tmp_path, "saves")
        assert waited(children, signal.SIGHUP, signal.SIGTERM).asked_by is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_rank_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.3)
    code = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); sys.exit(3)"
    )
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert rank.stdout is not None
    orphan = Path("/proc") / rank.stdout.readline().decode().strip()
    rank.stdout.close()
    assert local._wait([rank], 600.0).status == 3
    while orphan.exists() and "sleep" in (orphan / "cmdline").read_text():
        time.sleep(0.01)

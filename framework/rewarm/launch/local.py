"""Starting the ranks of one machine as child processes. No torch.

Rank 0 has the terminal; the others write to ``<run>/logs``. When one rank fails the others are ended, and the failing
rank's own message is shown once; for a rank that was killed, and so has none, it is said which one and by what.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ERROR_FOLDER = "REWARM_ERROR_FOLDER"
"""Environment variable: where ranks leave their error messages for the launcher to print."""
_GRACE_SECONDS = 10.0
_FIRST_PORT = 10_000
"""Below it are many that services are known by."""
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class _Ending:
    """How the ranks ended."""

    status: int
    """Exit status of the launcher: 0, that of the first rank that failed, or 128 + the signal that killed it."""
    rank: int = 0
    """The rank that failed first; a killed one before those that failed because of it."""
    killed_by: int | None = None
    """The signal that ended it."""
    asked_by: int | None = None
    """The last signal that the launcher was sent, and forwarded."""


def launch_local(arguments: list[str], num_ranks: int, log_folder: Path) -> int:
    """Run the ``rewarm`` command line on several ranks of this machine and wait.

    Args:
        arguments: the command line after ``rewarm``.
        num_ranks: processes to start.
        log_folder: where ranks above 0 write what they would print.

    Returns:
        The exit status: 0, or that of the first rank that failed.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    with tempfile.TemporaryDirectory(prefix="rewarm-") as errors, contextlib.ExitStack() as files:
        children: list[subprocess.Popen[bytes]] = []
        port = free_port()
        # A stop that comes while they start waits until there is somebody to forward it to.
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        for rank in range(num_ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
                ERROR_FOLDER: errors,
            }
            output = files.enter_context(open(log_folder / f"rank-{rank}.out", "ab")) if rank else None
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "rewarm", *arguments],
                    env=environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=functools.partial(_prepare_rank, os.getpid()),
                )
            )
        ending = _wait(children)
        if ending.status:
            print(_message(ending, Path(errors), log_folder), file=sys.stderr)
        return ending.status


def _prepare_rank(launcher: int) -> None:
    """In a child: be killed when the launcher is, so that no rank is left behind. A session of its own keeps the
    keyboard's SIGINT from arriving twice, from the terminal and forwarded."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)  # it was killed before it could be asked for


def _wait(children: list[subprocess.Popen[bytes]]) -> _Ending:
    """Wait for all; forward signals; when one fails give the others a moment, then end them."""
    asked_by: int | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked_by
        asked_by = number
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    try:
        while True:
            codes = [child.poll() for child in children]
            failed = {rank: code for rank, code in enumerate(codes) if code}
            if failed:
                # The others may have failed already because a killed one is gone: it comes first.
                rank = min(failed, key=lambda rank: (failed[rank] > 0, rank))
                code = failed[rank]
                return _Ending(code if code > 0 else 128 - code, rank, -code if code < 0 else None, asked_by)
            if all(code == 0 for code in codes):
                return _Ending(0)
            time.sleep(0.05)
    finally:
        _end(children)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _GRACE_SECONDS
    for child in children:
        if child.poll() is None:
            child.terminate()
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _message(ending: _Ending, errors: Path, log_folder: Path) -> str:
    """What the first rank that failed had to say, or what can be said in its place."""
    again = "the same command goes on from the newest checkpoint, or starts again where there is none"
    if ending.asked_by is not None and ending.status == 128 + ending.asked_by:
        return f"rewarm: {signal.Signals(ending.asked_by).name} received: stopped without saving\n  {again}"
    if ending.killed_by is not None:
        why = " (often the kernel, for want of memory: see dmesg)" if ending.killed_by == signal.SIGKILL else ""
        name = signal.Signals(ending.killed_by).name
        return f"rewarm: rank {ending.rank} was killed by {name}{why}; logs in {log_folder}\n  {again}"
    reports = [json.loads(path.read_text()) for path in sorted(errors.glob("rank-*.json"))]
    if not reports:
        return f"rewarm: rank {ending.rank} ended with status {ending.status} and no message; see {log_folder}"
    first = min(reports, key=lambda report: report["time"])
    text: str = first["text"]
    return text if first["clear"] else f"{text}\n  (rank {first['rank']}; more in {log_folder})"


def free_port() -> int:
    """A port on which nobody listens, below those that Linux gives to connections: one of these could be given away
    before rank 0 listens on it."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        first = 0
    draws = random.SystemRandom()
    candidates = [draws.randrange(_FIRST_PORT, first) for _ in range(50)] if first > _FIRST_PORT else []
    for port in [*candidates, 0]:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("Linux has no port left")

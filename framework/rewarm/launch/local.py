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

from rewarm.engine.threads import BUSY_CORES

ERROR_FOLDER = "REWARM_ERROR_FOLDER"
"""Environment variable: where ranks leave their error messages for the launcher to print."""
_GRACE_SECONDS = 10.0
"""Between the last request to end and SIGKILL."""
_IMPATIENT_SECONDS = 1.0
"""A second stop within this time of the first is the same one, delivered twice: shells, terminals and service managers
send to a process and to its group."""
_WRITING_BYTES = 1 << 20
"""More than a lock's heartbeat or a log line: a rank that writes this much is saving."""
_FIRST_PORT = 10_000
"""Below it are many that services are known by."""
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FORWARDED = (*_STOPS, signal.SIGUSR1, signal.SIGUSR2)


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
    hanging: tuple[int, ...] = ()
    """Ranks that did not end when they were asked to, and were killed."""


def launch_local(
    arguments: list[str], num_ranks: int, log_folder: Path, busy: float = 0.0, stop_seconds: float = 600.0
) -> int:
    """Run the ``rewarm`` command line on several ranks of this machine and wait.

    Args:
        arguments: the command line after ``rewarm``.
        num_ranks: processes to start.
        log_folder: where ranks above 0 write what they would print.
        busy: cores' worth of other programs' work on this machine.
        stop_seconds: without anything written after which ranks that were asked to stop are killed.

    Returns:
        The exit status: 0, or that of the first rank that failed.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    with tempfile.TemporaryDirectory(prefix="rewarm-") as errors, contextlib.ExitStack() as files:
        children: list[subprocess.Popen[bytes]] = []
        port = free_port()
        # A stop that comes while they start waits until there is somebody to forward it to.
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        # What the ranks may choose themselves, unless the user did.
        chosen = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads), BUSY_CORES: str(busy)}
        for rank in range(num_ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **chosen,
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
        ending = _wait(children, stop_seconds)
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


class _Stop:
    """What was asked of the launcher from outside, and how far it has gone to have it done.

    A signal is forwarded, with SIGCONT, since a stopped process does not see any other. The ranks then finish the step
    and save, however long that takes, as long as they write. A second Ctrl-C or SIGTERM, or ``stop_seconds`` without
    anything written, says that one of them hangs: they are asked to end without saving, and then killed.
    """

    def __init__(self, children: list[subprocess.Popen[bytes]], stop_seconds: float) -> None:
        self.asked_by: int | None = None
        self._children, self._stop_seconds = children, stop_seconds
        self._first: float | None = None
        self._patient_until = float("inf")
        self._written = 0
        self.overdue = False
        """The time is up: nobody waits for the ranks any longer."""

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Signal handler of the launcher."""
        self.asked_by = number
        now = time.monotonic()
        for child in self._children:
            _send(child, number)
            _send(child, signal.SIGCONT)
        if number not in _STOPS:
            return
        if self._first is None:
            self._first, self._written = now, self._bytes_written()
            self._patient_until = now + self._stop_seconds
        elif number != signal.SIGHUP and now - self._first > _IMPATIENT_SECONDS:
            self.overdue = True

    def look(self) -> None:
        """Called now and then: notice ranks that neither end nor save."""
        if time.monotonic() < self._patient_until:
            return
        written = self._bytes_written()
        if written - self._written < _WRITING_BYTES:
            self.overdue = True
        self._written, self._patient_until = written, time.monotonic() + self._stop_seconds

    def _bytes_written(self) -> int:
        total = 0
        for child in self._children:
            with contextlib.suppress(OSError, ValueError, StopIteration):
                lines = Path(f"/proc/{child.pid}/io").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))
        return total


def _wait(children: list[subprocess.Popen[bytes]], stop_seconds: float) -> _Ending:
    """Wait for all; forward signals; when one fails give the others a moment, then end them."""
    stop = _Stop(children, stop_seconds)
    # What nohup or a shell ignores stays ignored, here and in the ranks.
    heard = [number for number in _FORWARDED if not _is_ignored(number)]
    before = {number: signal.signal(number, stop.forward) for number in heard}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    hanging: tuple[int, ...] = ()
    try:
        while True:
            codes = [child.poll() for child in children]
            failed = {rank: code for rank, code in enumerate(codes) if code}
            stop.look()
            if stop.overdue and None in codes:
                hanging = _end(children)
            if hanging:
                assert stop.asked_by is not None
                return _Ending(128 + stop.asked_by, hanging[0], None, stop.asked_by, hanging)
            if failed:
                # The others may have failed already because a killed one is gone: it comes first.
                rank = min(failed, key=lambda rank: (failed[rank] > 0, rank))
                code = failed[rank]
                return _Ending(code if code > 0 else 128 - code, rank, -code if code < 0 else None, stop.asked_by)
            if all(code == 0 for code in codes):
                return _Ending(0)
            time.sleep(0.05)
    finally:
        _end(children)
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ignored(number: int) -> bool:
    """Whether a signal that a shell may have switched off for this process was: SIGHUP, by nohup."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _send(child: subprocess.Popen[bytes], number: int) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)


def _end(children: list[subprocess.Popen[bytes]]) -> tuple[int, ...]:
    """Ask the ranks that are left to end, then kill them, with what they started.

    Returns:
        The ranks that had to be killed.
    """
    deadline = time.monotonic() + _GRACE_SECONDS
    for child in children:
        _send(child, signal.SIGTERM)
        _send(child, signal.SIGCONT)
    killed = []
    for rank, child in enumerate(children):
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            killed.append(rank)
        # Each rank leads a process group of its own; what it started may have outlived it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return tuple(killed)


def _message(ending: _Ending, errors: Path, log_folder: Path) -> str:
    """What the first rank that failed had to say, or what can be said in its place."""
    again = "the same command goes on from the newest checkpoint, or starts again where there is none"
    if ending.hanging and ending.asked_by is not None:
        ranks = f"rank{'s' if len(ending.hanging) > 1 else ''} {', '.join(map(str, ending.hanging))}"
        name = signal.Signals(ending.asked_by).name
        return f"rewarm: {name} received, but {ranks} did not end and had to be killed; logs in {log_folder}\n  {again}"
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

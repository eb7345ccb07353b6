"""Starting the ranks of one machine as child processes. No torch.

Rank 0 has the terminal; the others write to ``<run>/logs``. When one rank fails the others are ended, and the failing
rank's own message is shown once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

ERROR_FOLDER = "REWARM_ERROR_FOLDER"
"""Environment variable: where ranks leave their error messages for the launcher to print."""
_GRACE_SECONDS = 10.0


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
        port = _free_port()
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
                    preexec_fn=_die_with_parent,
                )
            )
        status = _wait(children)
        if status:
            _print_errors(Path(errors), log_folder)
        return status


def _die_with_parent() -> None:
    """In a child: be killed when the launcher is, so that no rank is left behind. A session of its own keeps the
    keyboard's SIGINT from arriving twice, from the terminal and forwarded."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; forward signals; when one fails give the others a moment, then end them."""
    forwarded = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in forwarded}
    try:
        while True:
            codes = [child.poll() for child in children]
            failed = [code for code in codes if code not in (None, 0)]
            if failed:
                return failed[0] if failed[0] > 0 else 128 - failed[0]
            if all(code == 0 for code in codes):
                return 0
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


def _print_errors(errors: Path, log_folder: Path) -> None:
    """Show what the first rank that failed had to say, once."""
    reports = [json.loads(path.read_text()) for path in sorted(errors.glob("rank-*.json"))]
    if not reports:
        print(f"rewarm: a rank ended without a message; see {log_folder}", file=sys.stderr)
        return
    first = min(reports, key=lambda report: report["time"])
    print(first["text"], file=sys.stderr)
    if not first["clear"]:
        print(f"  (rank {first['rank']}; more in {log_folder})", file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

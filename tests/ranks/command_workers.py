"""The command line on ranks that are there already, as under torchrun: no start of an interpreter for each command."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ranks.harness import RanksFailed, run_ranks


def rewarm(folder: Path, num_ranks: int, *arguments: str, kill_after: tuple[str, int] | None = None) -> None:
    """Run a command on every rank of a new group.

    Args:
        folder: where it runs.
        num_ranks: ranks that it finds itself on.
        arguments: of ``rewarm``.
        kill_after: a run and a number of its metrics lines after which every rank is killed.
    """
    try:
        run_ranks(_command, num_ranks, folder, arguments, kill_after)
    except RanksFailed as failure:
        if kill_after is None or "Traceback" in str(failure):
            raise
        return
    assert kill_after is None, "the run ended before it was to be killed"


def _command(folder: Path, arguments: Sequence[str], kill_after: tuple[str, int] | None) -> None:
    from rewarm.cli.main import main

    os.chdir(folder)
    os.environ["WANDB_MODE"] = "disabled"
    if kill_after is not None:
        run, count = kill_after
        metrics = Path("runs") / run / "metrics.jsonl"
        _when(lambda: metrics.exists() and metrics.read_text().count("\n") >= count, _kill_this_process)
    sys.argv = ["rewarm", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, f"rewarm {' '.join(arguments)}: status {end.code}"


def _when(condition: Callable[[], bool], action: Callable[[], None]) -> None:
    def watch() -> None:
        while not condition():
            time.sleep(0.002)
        action()

    threading.Thread(target=watch, daemon=True).start()


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

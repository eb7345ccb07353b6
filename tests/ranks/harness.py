"""Runs a function on several ranks: real processes over gloo, with a hard time-out and nobody left behind.

The ranks are forked from a server that has imported torch, Megatron-Core and transformers once, so that a start costs
little.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from patience import PATIENCE
from rewarm.launch.local import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "rewarm.engine.megatron.engine",
        "rewarm.train.session",
        "transformers.models.llama.modeling_llama",
        "ranks.workers",
        "torch._dynamo",
    ]
)
# Once a rank has failed the others stand in a collective that never comes; this long they may still report.
_GRACE_SECONDS = 3.0


class RanksFailed(AssertionError):
    """One or more ranks raised, died or did not finish; the text holds each one's traceback."""


def run_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any, timeout: float = PATIENCE) -> list[Any]:
    """Call ``function(*arguments)`` on every rank of a new group.

    Args:
        function: of an importable module; its result is pickled back.
        num_ranks: processes, with torchrun's variables set.
        timeout: seconds until all are killed.

    Returns:
        Results in rank order.

    Raises:
        RanksFailed: if a rank raised, ended without a result, or the time ran out.
    """
    # The fork server takes its import path from the environment.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    port = free_port()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(num_ranks)]
    processes = [
        _CONTEXT.Process(target=_rank_main, args=(sender, function, arguments, rank, num_ranks, port), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        return _collect([receiver for receiver, _ in pipes], timeout)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _collect(receivers: Sequence[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    open_ends = {receiver: rank for rank, receiver in enumerate(receivers)}
    deadline = time.monotonic() + timeout
    while open_ends and time.monotonic() < deadline:
        for receiver in wait(list(open_ends), timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(receiver, Connection)
            rank = open_ends.pop(receiver)
            try:
                succeeded, value = receiver.recv()
            except EOFError:
                succeeded, value = False, "ended without a result"
            (results if succeeded else failures)[rank] = value
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    for rank in open_ends.values():
        failures.setdefault(rank, "did not finish" if not failures else "was still waiting for the others")
    if failures:
        raise RanksFailed("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(failures.items())))
    return [results[rank] for rank in range(len(receivers))]


def _rank_main(
    sender: Connection, function: Callable[..., Any], arguments: Sequence[Any], rank: int, size: int, port: int
) -> None:
    # The fork server ends with the test process, and the ranks with the fork server.
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    try:
        answer = True, function(*arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    sender.send(answer)
    # A destructor of a broken group may wait for ever for ranks that are gone.
    sender.close()
    os._exit(0)

"""Tokenizing batches of shards in parallel processes."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarm.data.parts import Batch, EncodeSettings, PartInfo, Reject, encode_batch
from rewarm.errors import UserError

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """What became of a batch."""

    batch: int
    """Its place among the batches given."""
    records: int
    rejects: int
    first_rejects: list[Reject]


def encode_batches(
    batches: list[Batch], settings: EncodeSettings, folder: Path, workers: int, on_bytes: Callable[[int], None]
) -> Iterator[BatchCounts]:
    """Tokenize batches into parts, in any order.

    One process tokenizes on ``workers`` threads; more processes share them evenly. The parts are the same.

    Args:
        batches: what to read, each once.
        settings: how to encode.
        folder: where parts lie.
        workers: cores to use.
        on_bytes: told of every piece of input that was read.

    Yields:
        Each batch's counts as soon as it is done.

    Raises:
        UserError: if a file cannot be read, or a worker was killed.
    """
    processes = min(workers, len(batches))
    if processes <= 1:
        with _tokenizer_threads(workers):
            for place, batch in enumerate(batches):
                yield _count(place, encode_batch(batch, settings, folder, on_bytes))
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        processes,
        mp_context=context,
        initializer=_start_worker,
        initargs=(counter, os.getpid(), workers // processes),
    ) as pool:
        try:
            futures = [
                pool.submit(_encode_in_worker, place, batch, settings, folder) for place, batch in enumerate(batches)
            ]
            yield from _drain(set(futures), counter, on_bytes)
        except BrokenProcessPool as error:
            raise UserError(
                "a tokenizing process was killed, most likely because the memory ran out",
                fix="run the same command again with fewer --workers: what is done is kept",
            ) from error
        finally:
            # Parts are whole or not there, so that nothing is lost by not waiting for those in hand.
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()


def _drain(pending: set[Future[BatchCounts]], counter: Any, on_bytes: Callable[[int], None]) -> Iterator[BatchCounts]:
    told = 0
    while pending:
        done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        with counter.get_lock():
            read = counter.value
        on_bytes(read - told)
        told = read
        for future in done:
            yield future.result()


def _count(place: int, infos: list[PartInfo]) -> BatchCounts:
    rejects = [reject._replace(raw="") for info in infos for reject in info.rejects]
    return BatchCounts(place, sum(info.records for info in infos), len(rejects), rejects[:3])


@contextlib.contextmanager
def _tokenizer_threads(workers: int) -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers > 1 else "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_counter: Any = None
_PR_SET_PDEATHSIG = 1


def _start_worker(counter: Any, parent: int, threads: int) -> None:
    global _counter
    _counter = counter
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with(parent)


def _end_with(parent: int) -> None:
    """End this process with the one that started it, however that ends: a process that is killed tells nobody.

    The kernel sees to it where it can (Linux). A thread would not do alone: it waits as long as a library keeps the
    interpreter's lock.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before it could be watched
        os._exit(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(place: int, batch: Batch, settings: EncodeSettings, folder: Path) -> BatchCounts:
    def advance(num_bytes: int) -> None:
        with _counter.get_lock():
            _counter.value += num_bytes

    return _count(place, encode_batch(batch, settings, folder, advance))

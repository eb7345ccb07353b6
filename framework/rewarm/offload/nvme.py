"""Optimizer state on local drives: direct I/O over several paths, many requests in flight.

The files are scratch: they have no name (``O_TMPFILE``), so a run that is killed at any moment leaves nothing behind
and nothing stale to trust; what a run resumes from is its checkpoint. A blob is split over the paths in proportion to
their measured bandwidth. Blocks go through Linux's asynchronous I/O in the compiled library, or through a pool of
threads without it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from rewarm import native
from rewarm.errors import NodeFault, UserError, ensure

log = logging.getLogger(__name__)

BLOCK = 1 << 20
"""Bytes per request."""
DEPTH = 64
"""Requests in flight."""
_FALLBACK_THREADS = 16
_HANGS_SECONDS = 60.0
"""A blob takes seconds; whoever ends does not wait longer for a drive that does not answer."""
_SECTOR = 512
_SICK = (errno.EIO, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO, errno.EUCLEAN, errno.ETIMEDOUT)
"""Errors of a drive that worked until now; a file system that found one may have made itself read-only."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class TransferError(OSError):
    """What the system said of one file."""

    def __init__(self, code: int, file: int) -> None:
        super().__init__(code, os.strerror(code))
        self.file = file
        """Its index among those of the transfer."""


class Store:
    """Fixed-size blobs, one per subgroup, spread over one or more paths.

    Not safe for use by two threads at once, except that reads and writes have a queue each.
    """

    def __init__(
        self, paths: Sequence[str | Path], sizes: Sequence[int], shares: Sequence[float] | None = None
    ) -> None:
        """Reserve the space.

        Args:
            paths: folders, best on different drives.
            sizes: bytes of each blob, multiples of the page size.
            shares: part of each blob that each path takes, in any positive scale; None for equal parts.

        Raises:
            UserError: if a path is no folder, cannot do direct I/O or has no room.
        """
        self._paths = [Path(path) for path in paths]
        self._locks = (threading.Lock(), threading.Lock())
        assert paths and all(size % mmap.PAGESIZE == 0 for size in sizes)
        self._pieces = [_cut(size, list(shares or [1.0] * len(paths))) for size in sizes]
        self._offsets: list[list[int]] = []
        ends = [0] * len(paths)
        for pieces in self._pieces:
            self._offsets.append(list(ends))
            ends = [end + piece for end, piece in zip(ends, pieces, strict=True)]
        self._files: list[int] = []
        self._queues: tuple[NativeQueue | ThreadQueue, ...] = ()
        try:
            for path, size in zip(self._paths, ends, strict=True):
                self._files.append(open_scratch(path, size))
            self._queues = (open_queue(), open_queue())
        except BaseException:
            self.close()
            raise

    def read(self, blob: int, buffer: torch.Tensor) -> None:
        """Fill a page-aligned uint8 host tensor of the blob's size.

        Raises:
            NodeFault: if a drive fails.
            OSError: with the path, if anything else does.
        """
        self._transfer(blob, buffer, write=False)

    def write(self, blob: int, buffer: torch.Tensor) -> None:
        """Store a page-aligned uint8 host tensor of the blob's size.

        Raises:
            NodeFault: if a drive fails.
            OSError: with the path, if anything else does.
        """
        self._transfer(blob, buffer, write=True)

    def close(self) -> None:
        """Give the space back, after what another thread may still transfer."""
        held = [lock for lock in self._locks if lock.acquire(timeout=_HANGS_SECONDS)]
        if len(held) == len(self._locks):
            for file in self._files:
                os.close(file)
            for queue in self._queues:
                queue.close()
            self._files, self._queues = [], ()
        else:
            # A number that was closed soon is another file's, which the transfer would go on to read or overwrite.
            log.error("%s: no answer for %g s; files stay open", ", ".join(map(str, self._paths)), _HANGS_SECONDS)
        for lock in held:
            lock.release()

    def _transfer(self, blob: int, buffer: torch.Tensor, write: bool) -> None:
        pieces = self._pieces[blob]
        ensure(
            buffer.dtype == torch.uint8 and buffer.numel() == sum(pieces),
            "a buffer of another size than what is read or written",
        )
        ensure(buffer.data_ptr() % mmap.PAGESIZE == 0, "direct I/O needs a page-aligned buffer")
        try:
            with self._locks[write]:
                assert self._queues, "the store is closed"
                self._queues[write].transfer(write, self._files, buffer, pieces, self._offsets[blob])
        except TransferError as error:
            raise _explained(error, self._paths[error.file], write) from error


def _explained(error: TransferError, path: Path, write: bool) -> NodeFault | OSError:
    """Whose fault it is, and where."""
    code = error.errno
    assert code is not None
    what = f"{'writing' if write else 'reading'} offloaded optimizer state failed: {error.strerror}"
    if code in _SICK:
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        return NodeFault(
            host,
            f"{what} ({path}); the run goes on from its last checkpoint, on another machine or without this path in "
            "offload.nvme_paths; its kernel's log (dmesg) has more",
        )
    if code == errno.EFBIG:
        what += "; ulimit -f limits the size of files"
    return OSError(code, what, str(path))


def open_queue(depth: int = DEPTH) -> NativeQueue | ThreadQueue:
    """The compiled queue, or threads where the library or the kernel has none."""
    library = native.load()
    if library is not None:
        try:
            return NativeQueue(library, depth)
        except OSError as error:
            log.warning(
                "Linux refuses asynchronous I/O for offloaded state (%s), so %d threads do it, more slowly; raise "
                "fs.aio-max-nr (sysctl), or allow io_setup in the container",
                error.strerror,
                _FALLBACK_THREADS,
            )
    return ThreadQueue()


class NativeQueue:
    """Linux asynchronous I/O of the compiled library."""

    def __init__(self, library: Any, depth: int = DEPTH) -> None:
        library.rewarm_aio_open.restype = ctypes.c_void_p
        library.rewarm_aio_transfer.restype = ctypes.c_int64
        self._library, error = library, ctypes.c_int(0)
        self._queue = library.rewarm_aio_open(depth, ctypes.byref(error))
        if not self._queue:
            raise OSError(-error.value, os.strerror(-error.value))

    def transfer(
        self, write: bool, files: Sequence[int], buffer: torch.Tensor, sizes: Sequence[int], offsets: Sequence[int]
    ) -> None:
        """Move each piece between its place in the buffer (end to end) and its offset in its file."""
        count, failed = len(files), ctypes.c_int(0)
        starts = [buffer.data_ptr() + sum(sizes[:i]) for i in range(count)]
        code = self._library.rewarm_aio_transfer(
            ctypes.c_void_p(self._queue),
            int(write),
            count,
            (ctypes.c_int * count)(*files),
            (ctypes.c_void_p * count)(*starts),
            (ctypes.c_int64 * count)(*sizes),
            (ctypes.c_int64 * count)(*offsets),
            ctypes.c_int64(BLOCK),
            ctypes.byref(failed),
        )
        if code != 0:
            raise TransferError(-code, failed.value)

    def close(self) -> None:
        """Free the queue."""
        self._library.rewarm_aio_close(ctypes.c_void_p(self._queue))


class ThreadQueue:
    """The same with positioned reads and writes on a pool of threads."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_FALLBACK_THREADS, thread_name_prefix="rewarm-nvme")

    def transfer(
        self, write: bool, files: Sequence[int], buffer: torch.Tensor, sizes: Sequence[int], offsets: Sequence[int]
    ) -> None:
        """Move each piece between its place in the buffer (end to end) and its offset in its file."""
        view = memoryview((ctypes.c_char * buffer.numel()).from_address(buffer.data_ptr())).cast("B")
        work = []
        for i, (file, size, offset) in enumerate(zip(files, sizes, offsets, strict=True)):
            start = sum(sizes[:i])
            for first in range(0, size, BLOCK):
                last = min(first + BLOCK, size)
                work.append((write, file, i, view[start + first : start + last], offset + first))
        blocks: list[Future[None]] = []
        try:
            blocks.extend(self._pool.submit(_block, *arguments) for arguments in work)
            for block in blocks:
                block.result()
        finally:  # even after an error nothing may work on the buffer any more
            for block in blocks:
                block.cancel()
            wait(blocks)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _block(write: bool, file: int, number: int, view: memoryview, offset: int) -> None:
    """Move a block; what was cut short goes on where it ended, for only then the system says why."""
    while len(view):
        try:
            moved = os.pwritev(file, [view], offset) if write else os.preadv(file, [view], offset)
        except OSError as error:
            raise TransferError(error.errno or errno.EIO, number) from error
        if moved % _SECTOR or not moved:
            raise TransferError(errno.EIO, number)
        view, offset = view[moved:], offset + moved


def open_scratch(folder: Path, size: int) -> int:
    """A nameless file for direct I/O with its space reserved.

    Raises:
        UserError: if the folder cannot hold it.
    """
    if not folder.is_dir():
        raise UserError(f"the NVMe path {folder} is not a folder", fix="create it, or correct offload.nvme_paths")
    file = None
    try:
        file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
        free = os.fstatvfs(file)
        if size > free.f_bavail * free.f_frsize:
            # Asked for too much, ext4 takes all there is before it refuses, and whoever writes meanwhile finds none.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(file, 0, max(size, mmap.PAGESIZE))
    except OSError as error:
        if file is not None:
            os.close(file)
        raise _refused(folder, size, error) from error
    return file


def _refused(folder: Path, size: int, error: OSError) -> UserError:
    """Why a folder cannot hold state, and what to do."""
    if error.errno in _FULL:
        free = os.statvfs(folder)
        why = " and this user's quota is used up" if error.errno == errno.EDQUOT else ""
        why = why or (" and its table of files is full" if free.f_files and not free.f_favail else "")
        return UserError(
            f"the NVMe path {folder} has {free.f_bavail * free.f_frsize / 1e9:.2f} GB free{why}, {size / 1e9:.2f} GB "
            "are needed",
            fix="free space (other runs may hold some in files without a name: lsof +L1), or name more paths in "
            "offload.nvme_paths",
        )
    if error.errno == errno.EFBIG:
        return UserError(
            f"the NVMe path {folder} may not hold a file of {size / 1e9:.2f} GB",
            fix="raise ulimit -f, or name more paths in offload.nvme_paths",
        )
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR):
        return UserError(
            f"the NVMe path {folder} lies on a file system without direct I/O or nameless files",
            fix="use a local ext4 or xfs file system; tmpfs, overlay and network file systems will not do",
        )
    return UserError(
        f"the NVMe path {folder} cannot be used: {error.strerror}",
        fix="make it writable for this user, or correct offload.nvme_paths",
    )


def measure(folder: Path, *, size: int = 256 << 20, seconds: float = 1.0) -> tuple[float, float]:
    """Read and write bandwidth of a path with direct I/O, bytes/s.

    Args:
        folder: the path.
        size: bytes of the file that is written and read.
        seconds: least time spent on each direction.

    Raises:
        UserError: if the path cannot be used.
    """
    from rewarm.offload.slabs import HostPool

    buffer = HostPool(pin=False).take(size, torch.uint8).fill_(1)
    store = Store([folder], [size])
    rates = []
    try:
        for transfer in (store.write, store.read):
            start, moved = time.perf_counter(), 0
            while moved == 0 or time.perf_counter() - start < seconds:
                transfer(0, buffer)
                moved += size
            rates.append(moved / (time.perf_counter() - start))
    finally:
        store.close()
    return rates[1], rates[0]


def _cut(size: int, shares: list[float]) -> list[int]:
    """Pages of a blob per path, in proportion to the shares; the last path takes the rest."""
    pages, total = size // mmap.PAGESIZE, sum(shares)
    pieces = [int(pages * share / total) * mmap.PAGESIZE for share in shares[:-1]]
    return [*pieces, size - sum(pieces)]

"""Drives that fill up, fail or do not answer: what is told, and what is left in order."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from patience import PATIENCE
from rewarm.errors import NodeFault, UserError
from rewarm.offload.planning.routes import Job, Placement, Route
from rewarm.offload.runtime import nvme
from rewarm.offload.runtime.device import ThrottledDevice
from rewarm.offload.runtime.execute import Executor, GroupStep
from rewarm.offload.runtime.nvme import Store, ThreadQueue, open_scratch
from rewarm.offload.runtime.profile import check_drives
from rewarm.offload.runtime.slabs import HostPool, ParameterShard, StateLayout
from rewarm.offload.runtime.states import States
from unit.offload.runtime.test_nvme import make_queue


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """``ulimit -f``, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def two_folders(disk: Path) -> list[Path]:
    folders = [disk / "good", disk / "bad"]
    for folder in folders:
        folder.mkdir()
    return folders


def random_buffer(size: int) -> torch.Tensor:
    return HostPool(pin=False).take(size, torch.uint8).random_()


@pytest.mark.parametrize("kind", ["native", "threads"])
def test_a_drive_that_fails_is_named_and_the_others_are_left_in_order(
    kind: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that ends too early answers a read with nothing, as a damaged file system would."""
    monkeypatch.setattr(nvme, "open_queue", lambda: make_queue(kind))
    monkeypatch.setenv("SLURMD_NODENAME", "node17")
    size = 24 << 20  # more blocks than the queue is deep
    store, buffer = Store(two_folders(disk), [size]), random_buffer(size)
    store.write(0, buffer)
    os.ftruncate(store._files[1], (5 << 20) + 4096)  # in the middle of a block
    with pytest.raises(NodeFault, match=r"reading offloaded .* failed: Input/output error \(.*/bad\)") as caught:
        store.read(0, random_buffer(size))
    assert caught.value.node == "node17" and "offload.nvme_paths" in str(caught.value)
    store.write(0, buffer)  # the queue is as it was before
    again = random_buffer(size)
    store.read(0, again)
    assert torch.equal(again, buffer)
    store.close()


@pytest.mark.parametrize("kind", ["native", "threads"])
def test_a_write_that_is_cut_short_goes_on_until_the_system_says_why(
    kind: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme, "open_queue", lambda: make_queue(kind))
    size = 24 << 20
    store, buffer = Store(two_folders(disk), [size], shares=[1.0, 3.0]), random_buffer(size)
    with file_limit((17 << 20) + 8192), pytest.raises(OSError, match="ulimit -f") as caught:
        store.write(0, buffer)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(disk / "bad")
    store.write(0, buffer)
    store.close()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, with a space in its name."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "quite small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    try:
        os.close(open_scratch(place, 4096))
        yield place
    except UserError:
        pytest.skip("this kernel does no direct I/O in memory")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(folder: Path) -> None:
    with pytest.raises(OSError, match="No space"), open(folder / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1 << 14))


@pytest.mark.parametrize("kind", ["native", "threads"])
def test_a_disk_that_fills_up(kind: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was reserved stays; where a file system takes it back, as a thin one may, the error names the path."""
    monkeypatch.setattr(nvme, "open_queue", lambda: make_queue(kind))
    size = 8 << 20
    store, buffer, again = Store([small], [size, size]), random_buffer(size), random_buffer(size)
    fill(small)
    for blob in range(2):
        store.write(blob, buffer)
        store.read(blob, again)
        assert torch.equal(again, buffer)
    with pytest.raises(UserError, match=r"0\.00 GB free, 0\.01 GB are needed") as refused:
        Store([small], [size])
    assert "lsof +L1" in str(refused.value)
    os.ftruncate(store._files[0], 3 << 20)
    with open(small / "second filler", "wb", buffering=0) as filler:
        filler.write(bytes(10 << 20))
    with pytest.raises(OSError, match="writing offloaded optimizer state failed: No space") as caught:
        store.write(0, buffer)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(small)
    store.close()


def test_a_folder_in_memory_is_refused_even_where_linux_does_direct_io_there(small: Path) -> None:
    with pytest.raises(UserError, match=r"small lies in memory \(tmpfs\)"):
        check_drives([str(small)])


def test_two_runs_may_use_one_folder(disk: Path) -> None:
    stores, buffers = [Store([disk], [1 << 20]) for _ in range(2)], [random_buffer(1 << 20) for _ in range(2)]
    for store, buffer in zip(stores, buffers, strict=True):
        store.write(0, buffer)
    stores[0].close()
    again = random_buffer(1 << 20)
    stores[1].read(0, again)
    assert torch.equal(again, buffers[1])
    stores[1].close()


def late(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[threading.Event, list[int]]:
    """Positioned reads or writes that begin when the event is set, and how many have ended."""
    go, ended, real = threading.Event(), [], getattr(os, name)

    def transfer(*arguments: Any) -> int:
        assert go.wait(PATIENCE)
        moved: int = real(*arguments)
        ended.append(moved)
        return moved

    monkeypatch.setattr(os, name, transfer)
    monkeypatch.setattr(nvme, "open_queue", ThreadQueue)
    return go, ended


def test_after_an_error_nothing_works_on_the_buffer_any_more(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, ended = late(monkeypatch, "preadv")
    store, buffer = Store([disk], [8 << 20]), random_buffer(8 << 20)
    real = nvme._block

    def block(write: bool, file: int, number: int, view: memoryview, offset: int) -> None:
        if offset == 0:
            raise nvme.TransferError(errno.EIO, number)
        real(write, file, number, view, offset)

    monkeypatch.setattr(nvme, "_block", block)
    timer = threading.Timer(0.2, go.set)
    timer.start()
    with pytest.raises(NodeFault):
        store.read(0, buffer)
    assert go.is_set(), "it did not wait for the others"
    before = len(ended)
    time.sleep(0.05)
    assert len(ended) == before
    timer.join()
    store.close()


def test_files_are_closed_after_what_is_under_way(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a closed file may be that of another one the next moment."""
    go, ended = late(monkeypatch, "pwritev")
    store, buffer = Store([disk], [4 << 20]), random_buffer(4 << 20)
    writer = threading.Thread(target=store.write, args=(0, buffer))
    writer.start()
    closer = threading.Thread(target=store.close)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive() and os.fstat(store._files[0]).st_size == 4 << 20
    go.set()
    writer.join(60)
    closer.join(60)
    assert len(ended) == 4 and store._files == []
    with pytest.raises(AssertionError, match="closed"):
        store.read(0, buffer)


def test_a_drive_that_never_answers_is_left_alone(
    disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go, _ = late(monkeypatch, "pwritev")
    monkeypatch.setattr(nvme, "_HANGS_SECONDS", 0.05)
    store = Store([disk], [1 << 20])
    writer = threading.Thread(target=store.write, args=(0, random_buffer(1 << 20)))
    writer.start()
    store.close()
    assert "no answer" in caplog.text and str(disk) in caplog.text and len(store._files) == 1
    go.set()
    writer.join(60)
    store.close()
    assert store._files == []


def test_threads_take_over_where_the_kernel_has_no_queue_left(caplog: pytest.LogCaptureFixture) -> None:
    allowed = int(Path("/proc/sys/fs/aio-max-nr").read_text())
    queue = nvme.open_queue(depth=allowed + 1)
    assert isinstance(queue, ThreadQueue) and "fs.aio-max-nr" in caplog.text
    queue.close()


def test_a_drive_that_fails_in_a_step_ends_the_step(disk: Path) -> None:
    layout = StateLayout.of([ParameterShard("w", 60_000)], 10_000)
    placement = Placement((Route.NVME_CPU, Route.NVME_STREAMED) * 3, slots=2, host_slots=2)
    parameters = torch.ones(layout.numel)
    types = {"parameter_type": torch.float32, "gradient_type": torch.float32}
    device = ThrottledDevice()
    states = States(layout, placement, device, pool=HostPool(pin=False), nvme_paths=[disk], **types)
    states.load(parameters, torch.zeros(layout.numel), torch.zeros(layout.numel), parameters)
    job = Job(layout.numel, 0.0, 0.0, grad_bytes=4, param_bytes=4)
    gradients = torch.ones(layout.numel)
    executor = Executor(layout, placement, job, device, states, parameters=parameters, gradients=gradients)
    executor.run_step(1, [GroupStep(1e-3)])
    assert states.store is not None
    os.ftruncate(states.store._files[0], 4096)
    with pytest.raises(NodeFault, match=str(disk)):
        executor.run_step(2, [GroupStep(1e-3)])
    with pytest.raises(AssertionError, match="not whole"):
        executor.begin(3, [GroupStep(1e-3)])
    executor.close()
    states.close()


def test_a_file_that_is_larger_than_allowed_is_told(disk: Path) -> None:
    with file_limit(1 << 20), pytest.raises(UserError, match=r"may not hold a file of 0\.01 GB") as caught:
        open_scratch(disk, 8 << 20)
    assert "ulimit -f" in str(caught.value)


def test_a_file_system_of_another_kind_is_told() -> None:
    with pytest.raises(UserError, match="/proc") as caught:
        open_scratch(Path("/proc"), 4096)
    assert "ext4 or xfs" in str(caught.value)

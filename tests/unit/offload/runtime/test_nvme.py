"""Blobs come back as they were written, through both queues, over several paths, and bad paths are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from patience import PATIENCE
from rewarm.errors import UserError
from rewarm.kernels import adamw, native
from rewarm.offload.runtime import nvme
from rewarm.offload.runtime.nvme import NativeQueue, Store, ThreadQueue, open_scratch
from rewarm.offload.runtime.slabs import HostPool

ROOT = Path(__file__).parents[4]
SIZES = [4096, 3 << 20, (5 << 20) + 4096]


def make_queue(kind: str) -> NativeQueue | ThreadQueue:
    if kind == "threads":
        return ThreadQueue()
    library = native.load()
    assert library is not None
    return NativeQueue(library, depth=8)


@pytest.mark.parametrize("paths", [1, 3])
@pytest.mark.parametrize("kind", ["native", "threads"])
def test_blobs_come_back(kind: str, paths: int, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "open_queue", lambda: make_queue(kind))
    folders = [disk / str(i) for i in range(paths)]
    for folder in folders:
        folder.mkdir()
    store = Store(folders, SIZES, shares=[3.0, 1.0, 2.5][:paths])
    pool = HostPool(pin=False)
    blobs = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in SIZES]
    for i in (2, 0, 1):
        buffer = pool.take(SIZES[i], torch.uint8)
        buffer.copy_(blobs[i])
        store.write(i, buffer)
    for i in (1, 2, 0):
        buffer = pool.take(SIZES[i], torch.uint8)
        store.read(i, buffer)
        assert torch.equal(buffer, blobs[i])
    store.close()


def test_a_path_takes_its_share_of_each_blob() -> None:
    pieces = nvme._cut(100 * 4096, [3.0, 1.0])
    assert pieces == [75 * 4096, 25 * 4096]
    assert sum(nvme._cut(7 * 4096, [1.0, 1.0, 1.0])) == 7 * 4096


def test_the_files_have_no_names_and_give_their_space_back(disk: Path) -> None:
    before = os.statvfs(disk).f_bavail
    store = Store([disk], [64 << 20])
    assert list(disk.iterdir()) == []
    assert os.statvfs(disk).f_bavail < before
    store.close()


STEPPER = """
import os, sys, torch
from pathlib import Path
from rewarm.offload.runtime.device import ThrottledDevice
from rewarm.offload.runtime.execute import Executor, GroupStep
from rewarm.offload.planning.routes import Job, Placement, Route
from rewarm.offload.runtime.slabs import HostPool, StateLayout, ParameterShard
from rewarm.offload.runtime.states import States
folder, checkpoint, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
layout = StateLayout.of([ParameterShard("w", 100_000)], 10_000)
routes = (Route.NVME_STREAMED, Route.NVME_CPU) * 5
placement = Placement(routes, slots=2, host_slots=2, split=True)
device = ThrottledDevice(h2d=10e6, d2h=10e6)
parameters = torch.empty(layout.numel, dtype=torch.bfloat16)
gradients = torch.empty_like(parameters)
states = States(layout, placement, device, parameter_type=torch.bfloat16, gradient_type=torch.bfloat16,
                pool=HostPool(pin=False), nvme_paths=[folder])
done, *state = torch.load(checkpoint)
states.load(*state, parameters)
job = Job(layout.numel, 0.0, 0.0)
executor = Executor(layout, placement, job, device, states, parameters=parameters, gradients=gradients)
for number in range(done + 1, last + 1):
    print(number, flush=True)
    gradients.normal_(generator=torch.Generator().manual_seed(number))
    executor.run_step(number, [GroupStep(1e-3)])
    torch.save((number, *states.export(parameters)), checkpoint.with_suffix(".partial"))
    checkpoint.with_suffix(".partial").replace(checkpoint)
executor.close()
"""


def test_killed_in_the_middle_of_steps_it_resumes_and_leaves_nothing_behind(disk: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    generator = torch.Generator().manual_seed(0)
    state = (torch.randn(100_032, generator=generator), torch.zeros(100_032), torch.zeros(100_032))
    torch.save((0, *state), checkpoint)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "framework"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STEPPER, str(disk), str(checkpoint)]
    for delay in (0.03, 0.11):  # a step takes about 0.1 s: the link is slow
        child = subprocess.Popen([*command, "1000000"], env=environment, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() and child.stdout.readline(), "it ended by itself"
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=PATIENCE)
        assert list(disk.iterdir()) == []
    last = torch.load(checkpoint)[0] + 3
    assert last > 3
    subprocess.run([*command, str(last)], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)
    for number in range(1, last + 1):
        gradient = torch.empty(100_032, dtype=torch.bfloat16)
        gradient.normal_(generator=torch.Generator().manual_seed(number))
        adamw.update(adamw.AdamWStep.prepare(step=number, learning_rate=1e-3), *state, gradient)
    for ours, theirs in zip(torch.load(checkpoint)[1:], state, strict=True):
        # Nobody reads or writes what pads the last subgroup.
        assert torch.equal(ours[:100_000].view(torch.int32), theirs[:100_000].view(torch.int32))
    assert list(disk.iterdir()) == []


def test_a_killed_process_gives_its_space_back(disk: Path) -> None:
    code = (
        "import sys, time; from rewarm.offload.runtime.nvme import Store\n"
        "store = Store([sys.argv[1]], [64 << 20]); print('ready', flush=True); time.sleep(3600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "framework"), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(disk)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline().strip() == "ready"
    held = os.statvfs(disk).f_bavail
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while os.statvfs(disk).f_bavail - held < (32 << 20) // os.statvfs(disk).f_frsize and time.monotonic() < deadline:
        time.sleep(0.1)
    assert os.statvfs(disk).f_bavail > held


def test_host_memory_is_bounded_by_the_slots_and_not_by_the_state(disk: Path) -> None:
    code = """
import resource, sys, torch
from pathlib import Path
from rewarm.offload.runtime.device import ThrottledDevice
from rewarm.offload.runtime.execute import Executor, GroupStep
from rewarm.offload.planning.routes import Job, Placement, Route
from rewarm.offload.runtime.slabs import HostPool, StateLayout, ParameterShard
from rewarm.offload.runtime.states import States
size, count = 1 << 18, 40
layout = StateLayout.of([ParameterShard("w", size * count)], size)
parameters = torch.ones(layout.numel, dtype=torch.bfloat16)
gradients = torch.full((layout.numel,), 1e-3, dtype=torch.bfloat16)
placement = Placement((Route.NVME_STREAMED,) * count, slots=2, host_slots=2)
device = ThrottledDevice()
states = States(layout, placement, device, parameter_type=torch.bfloat16, gradient_type=torch.bfloat16,
                pool=HostPool(pin=False), nvme_paths=[Path(sys.argv[1])])
for slot in states._host_slots.values():
    slot.zero_()
for subgroup in range(count):
    states.write(subgroup, 0)
job = Job(layout.numel, 0.0, 0.0)
executor = Executor(layout, placement, job, device, states, parameters=parameters, gradients=gradients)
executor.run_step(1, [GroupStep(1e-3)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for number in range(2, 5):
    executor.run_step(number, [GroupStep(1e-3)])
executor.close()
print(states.pool.taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "framework"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(disk)], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    taken, growth = (int(word) for word in result.stdout.split())
    state = 12 * (1 << 18) * 40
    assert taken == 2 * 12 * (1 << 18)
    assert growth * 1024 < state / 10  # the resident set does not follow the state


def test_a_path_without_room_is_told_in_figures(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is reserved before: ext4 would fill the drive, and others would find it full meanwhile."""
    free = os.statvfs(disk)
    reserve: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda file, offset, size: reserve.append(size))
    with pytest.raises(UserError, match=r"GB free, .* GB are needed"):
        open_scratch(disk, 2 * free.f_bavail * free.f_frsize)
    assert not reserve


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs")
def test_a_path_in_memory_is_refused_or_serves() -> None:
    try:
        os.close(open_scratch(Path("/dev/shm"), 4096))
    except UserError as error:
        assert "direct I/O" in str(error)


def test_a_missing_path_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        Store([tmp_path / "absent"], [4096])


def test_bandwidth_is_measured(disk: Path) -> None:
    read, write = nvme.measure(disk, size=4 << 20, seconds=0.01)
    assert read > 0 and write > 0

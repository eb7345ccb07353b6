"""The CUDA device waits wherever it has to: streams that run behind, without a GPU.

Names of ``torch.cuda`` are replaced by streams that are threads and do what they are given late. The code of the device
and of the executor is that of a run; what is missing a wait reads old numbers, or has its own overwritten.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patience import PATIENCE
from rewarm.kernels import adamw
from rewarm.offload.planning.routes import Job, Placement
from rewarm.offload.runtime import states
from rewarm.offload.runtime.device import CudaDevice
from rewarm.offload.runtime.execute import Executor
from rewarm.offload.runtime.slabs import HostPool, StateLayout
from rewarm.offload.runtime.states import States
from unit.offload.runtime.test_execute import COUNT, LAYOUT, PLACEMENTS, Plain, groups, make_gradients

INDEX = 5  # not the device that a new thread begins with


class Event:
    """``torch.cuda.Event``."""

    def __init__(self, blocking: bool = False) -> None:
        assert blocking, "a thread that spins takes a core from the update"
        self._reached = threading.Event()

    def record(self, stream: Stream) -> None:
        stream.add(self._reached.set)

    def synchronize(self) -> None:
        assert self._reached.wait(PATIENCE), "an event was never reached"

    def wait(self) -> None:
        torch.cuda.current_stream().add(self.synchronize)


class Stream:
    """``torch.cuda.Stream``: a thread that does what it is given in order, each a little late."""

    def __init__(self, device: Any = None) -> None:
        self._work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._delays = random.Random(7)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, work: Callable[[], Any]) -> None:
        self._work.put(work)

    def record_event(self, event: Event) -> Event:
        event.record(self)
        return event

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            time.sleep(self._delays.uniform(0.0, 2e-3))
            work()


class Cuda:
    """What the device uses of ``torch.cuda``, and who may use it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.main, self.streams = Stream(), []
        self._here = threading.local()
        self.locked: dict[int, int] = {}
        self._copy = torch.Tensor.copy_
        names = ("set_device", "stream", "current_stream", "cudart", "Stream", "get_device_name")
        for name in names:
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.Tensor, "copy_", self._copied())
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor: self._is_locked(tensor))
        kernels = {name: self._queued(getattr(adamw, name)) for name in ("update", "update_split", "update_8bit")}
        patch.setattr(states, "adamw", SimpleNamespace(**(vars(adamw) | kernels)))

    def set_device(self, device: Any) -> None:
        self._here.device = device

    def get_device_name(self, index: int) -> str:
        return "late"

    def Stream(self, device: Any) -> Stream:
        assert device == self._here.device, "a stream of another device than the thread's"
        self.streams.append(Stream())
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._here.stream = stream
        yield
        del self._here.stream

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self._here, "stream", self.main)

    def cudart(self) -> Any:
        def register(pointer: int, size: int, flags: int) -> int:
            self.locked[pointer] = size
            return 0

        return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda pointer: self.locked.pop(pointer))

    def close(self) -> None:
        assert not self.locked, "memory is still locked"
        for stream in (self.main, *self.streams):
            stream.close()

    def _is_locked(self, tensor: torch.Tensor) -> bool:
        first = tensor.data_ptr()
        last = first + tensor.numel() * tensor.element_size()
        return any(start <= first and last <= start + size for start, size in self.locked.items())

    def _copied(self) -> Any:
        def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            stream = getattr(self._here, "stream", None)
            if stream is None:
                return self._copy(target, source)
            stream.add(lambda: self._copy(target, source))
            return target

        return copy

    def _queued(self, kernel: Callable[..., None]) -> Callable[..., None]:
        def launch(*arguments: Any, **more: Any) -> None:
            if threading.current_thread().name == "offload-cpu":
                kernel(*arguments, **more)
            else:
                self.current_stream().add(lambda: kernel(*arguments, **more))

        return launch


class NeverSettles(CudaDevice):
    """Says that work is done when it was queued."""

    def settle(self) -> None:
        """No wait."""


class NeverWaits(CudaDevice):
    """Does not care what other threads have queued."""

    def wait(self, event: Any) -> None:
        """No wait."""

    def settle(self) -> None:
        """As it is."""
        self.record_event().synchronize()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    found = Cuda(monkeypatch)
    yield found
    found.close()


def open_late(kind: type[CudaDevice]) -> CudaDevice:
    device = kind(INDEX)
    device.torch_device = torch.device("cpu")  # where its memory is
    torch.cuda.set_device(device.torch_device)
    return device


def trained(
    cuda: Cuda, device: CudaDevice, name: str, disk: Path, *, kind: torch.dtype, clip: bool = True, steps: int = 4
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters and state after some steps, ours and those of the plain update; gradients come late as well."""
    plain = Plain(kind)
    parameters = torch.empty_like(plain.parameters)
    gradients = torch.full((LAYOUT.numel,), float("nan"))
    placement = Placement(PLACEMENTS[name], slots=2, host_slots=2, split=kind == torch.bfloat16)
    pool = HostPool(pin=True)
    widths = {"parameter_type": kind, "gradient_type": gradients.dtype}
    state = States(LAYOUT, placement, device, pool=pool, nvme_paths=[disk], **widths)
    state.load(plain.master, *plain.moments, parameters)
    job = Job(LAYOUT.numel, 0.0, 0.0, clip=clip, grad_bytes=4, param_bytes=kind.itemsize)
    executor = Executor(LAYOUT, placement, job, device, state, parameters=parameters, gradients=gradients)
    for number in range(1, steps + 1):
        fresh = make_gradients(number, torch.float32)
        gradients.fill_(float("nan"))
        executor.begin(number, groups(number))
        for subgroup in reversed(range(COUNT)):
            start, stop = LAYOUT.bounds(subgroup)
            cuda.main.add(partial(gradients.__setitem__, slice(start, stop), fresh[start:stop]))
            executor.gradient_ready(subgroup)
        executor.release()
        executor.finish()
        plain.step(number, fresh, 1.0)
    ours = [parameters.clone(), *state.export(parameters)]
    executor.close()
    state.close()
    pool.close()
    views = (ours, [plain.parameters, plain.master, *plain.moments])
    left, right = ([_view(LAYOUT, flat) for flat in flats] for flats in views)
    return left, right


def _view(layout: StateLayout, flat: torch.Tensor) -> torch.Tensor:
    return torch.cat([layout.view(flat, shard) for shard in range(len(layout.shards))])


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_late_streams_change_nothing(kind: torch.dtype, clip: bool, cuda: Cuda, disk: Path) -> None:
    ours, plain = trained(cuda, open_late(CudaDevice), "all five", disk, kind=kind, clip=clip)
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", [NeverSettles, NeverWaits])
def test_a_missing_wait_is_found_out(kind: type[CudaDevice], cuda: Cuda, disk: Path) -> None:
    ours, plain = trained(cuda, open_late(kind), "all five", disk, kind=torch.bfloat16, clip=False)
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))


def test_memory_that_is_given_back_is_unlocked(cuda: Cuda) -> None:
    pool = HostPool(pin=True)
    first, second = pool.take(10_000, torch.float32), pool.take(5_000, torch.float32)
    pool.give(first)
    assert first.is_pinned()
    pool.trim()
    assert second.is_pinned() and len(cuda.locked) == 1 and pool.taken == second.nbytes // 4096 * 4096 + 4096
    pool.close()

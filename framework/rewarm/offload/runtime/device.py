"""What the executor needs of a device: memory, copies in each direction, streams. CUDA, and a stand-in without a GPU.

The stand-in keeps "device" memory in a pool of its own and copies at a set bandwidth, on the threads of the executor,
so that order, hazards and exactness are tested with real concurrency and times can be held against the simulator's.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from rewarm.errors import UserError, ensure
from rewarm.offload.planning.simulate import fair_speeds

Direction = Literal["h2d", "d2h"]


class Device(Protocol):
    """Memory and copies of one accelerator."""

    name: str
    torch_device: torch.device
    pins: bool
    """Host memory must be locked for its copies."""
    node: int | None
    """NUMA node it hangs on, None if there is only one."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, direction: Direction) -> None:
        """Copy between host and device; returns when the bytes are there."""

    def stream(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Enter the device's stream of a name, on a thread that has it to itself."""

    def record_event(self) -> Any:
        """An event that ends the work queued so far by the calling thread."""

    def wait(self, event: Any) -> None:
        """Block until an event, or a collective whose handle is given instead, is reached."""

    def settle(self) -> None:
        """Block until the work queued by the calling thread is done."""

    def pace_host(self, elements: int, began: float) -> None:
        """Called after the host has updated elements, since a moment of ``time.perf_counter``; a stand-in may wait."""


def check_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies never convert: the wire type is what both ends hold."""
    ensure(target.dtype == source.dtype, f"a copy of {source.dtype} into {target.dtype} would convert")
    ensure(
        target.numel() == source.numel() and target.is_contiguous() and source.is_contiguous(),
        "a copy between different lengths, or of what is not contiguous",
    )


class CudaDevice:
    """A CUDA device with a stream per thread of the executor.

    What a thread queues is waited for on the host before the thread says that it is done, so memory never
    changes hands between streams while one of them still works on it, and the allocator needs to be told nothing.
    """

    pins = True

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(index)
        self.node = numa_node(index)
        self._streams: dict[str, Any] = {}

    def copy(self, target: torch.Tensor, source: torch.Tensor, direction: Direction) -> None:
        """Copy on the current stream and wait for it; the host side must be locked."""
        check_copy(target, source)
        host = source if direction == "h2d" else target
        ensure(host.is_pinned(), "the host side of a copy is not locked, so it would be staged and serialised")
        target.copy_(source, non_blocking=True)
        self.settle()

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Enter the CUDA stream of a name."""
        torch.cuda.set_device(self.torch_device)
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(self.torch_device)
        with torch.cuda.stream(self._streams[name]):
            yield

    def record_event(self) -> Any:
        """An event recorded on the current stream of the calling thread.

        Whoever waits for it sleeps: the threads that would spin otherwise take cores from the CPU's update.
        """
        return torch.cuda.current_stream(self.torch_device).record_event(torch.cuda.Event(blocking=True))

    def wait(self, event: Any) -> None:
        """Let the current stream wait for an event or a collective, and the thread for the stream."""
        event.wait()
        self.settle()

    def settle(self) -> None:
        """Block the thread until its current stream is empty."""
        self.record_event().synchronize()

    def pace_host(self, elements: int, began: float) -> None:
        """The host is as fast as it is."""


class ThrottledDevice:
    """A second pool of host memory behind a link of set bandwidth, beside a host of set speed.

    A few cores cannot imitate a link that outruns their own update, so the update is slowed as well where the two are
    to be weighed against each other.
    """

    pins = False
    node: int | None = None
    torch_device = torch.device("cpu")

    def __init__(
        self,
        *,
        h2d: float = float("inf"),
        d2h: float = float("inf"),
        duplex: float = float("inf"),
        host_rate: float = float("inf"),
    ) -> None:
        """A link and a host.

        Args:
            h2d, d2h, duplex: bytes/s to the device, from the device, and both together.
            host_rate: parameters/s that the host's update does not exceed.
        """
        self.name = f"throttled (h2d {h2d / 1e9:g}, d2h {d2h / 1e9:g}, duplex {duplex / 1e9:g} GB/s"
        self.name += f", host {host_rate / 1e9:g} G parameters/s)" if host_rate < float("inf") else ")"
        self._host_rate = host_rate
        self._rate = {"h2d": h2d, "d2h": d2h}
        self._limits = {
            name: rate for name, rate in (("h2d", h2d), ("d2h", d2h), ("pcie", duplex)) if rate < float("inf")
        }
        self._lock = threading.Lock()
        self._active: list[Direction] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor, direction: Direction) -> None:
        """Copy in chunks, each paced by the share of the link that this copy has while it runs."""
        check_copy(target, source)
        rate = self._rate[direction]
        if rate == float("inf"):
            target.copy_(source)
            return
        with self._lock:
            self._active.append(direction)
        try:
            self._paced(target, source, direction, rate)
        finally:
            with self._lock:
                self._active.remove(direction)

    def _paced(self, target: torch.Tensor, source: torch.Tensor, direction: Direction, rate: float) -> None:
        chunk = max(1, int(rate * 2e-3) // source.element_size())
        due = time.perf_counter()
        for first in range(0, source.numel(), chunk):
            size = min(chunk, source.numel() - first)
            target.narrow(0, first, size).copy_(source.narrow(0, first, size))
            due += size * source.element_size() / (rate * self._share(direction))
            if (ahead := due - time.perf_counter()) > 0:
                time.sleep(ahead)

    def _share(self, direction: Direction) -> float:
        with self._lock:
            active = list(self._active)
        demands = [[(name, self._rate[way]) for name in (way, "pcie") if name in self._limits] for way in active]
        return fair_speeds(demands, self._limits)[active.index(direction)]

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Threads alone are streams here; there is nothing to enter."""
        yield

    def record_event(self) -> None:
        """Work is done when its call returns."""

    def wait(self, event: Any) -> None:
        """Work is done when its call returns, but for that of an asynchronous collective."""
        if event is not None:
            event.wait()

    def settle(self) -> None:
        """Work is done when its call returns."""

    def pace_host(self, elements: int, began: float) -> None:
        """Sleep until the update has taken as long as at the set rate."""
        if (ahead := began + elements / self._host_rate - time.perf_counter()) > 0:
            time.sleep(ahead)


def numa_node(index: int, system: Path = Path("/sys")) -> int | None:
    """NUMA node of a CUDA device, None where the machine has one node or does not say.

    Args:
        index: of the device.
        system: where Linux describes the machine.
    """
    if len(list((system / "devices/system/node").glob("node[0-9]*"))) < 2:
        return None
    properties = torch.cuda.get_device_properties(index)
    parts: list[Any] = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in parts:
        return None  # older versions of torch do not know the address
    address = "{:04x}:{:02x}:{:02x}.0".format(*parts)
    try:
        node = int((system / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def open_device(stand_in: float | None = None, *, required: bool = True) -> Device:
    """The CUDA device that torch has selected, or a second pool of host memory where there is none.

    Args:
        stand_in: GB/s each way of the link to the pool; None means as fast as memory.
        required: a machine without CUDA is an error unless ``stand_in`` is given.

    Raises:
        UserError: if there is no CUDA device where one is required, or one where a stand-in was asked for.
    """
    if torch.cuda.is_available():
        if stand_in is not None:
            raise UserError(
                f"offload.stand_in={stand_in:g} stands in for a GPU, and this machine has one",
                fix="remove it",
            )
        return CudaDevice(torch.cuda.current_device())
    if stand_in is not None:
        rate = stand_in * 1e9
        return ThrottledDevice(h2d=rate, d2h=rate, duplex=2 * rate)
    if not required:
        return ThrottledDevice()
    raise UserError(
        "no CUDA device is visible: optimizer offload moves state between a GPU and its host",
        fix="run on a GPU machine, or give --stand-in a bandwidth",
    )

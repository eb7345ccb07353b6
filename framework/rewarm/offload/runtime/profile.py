"""Measured rates of a machine, cached per machine: what placements are computed from.

Bandwidths are taken alone and together, because what counts is what is left when everything runs: both directions of
the link, and the CPU's update under both.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rewarm.errors import UserError
from rewarm.kernels import adamw
from rewarm.offload.planning.routes import Machine
from rewarm.offload.runtime import nvme
from rewarm.offload.runtime.device import Device
from rewarm.offload.runtime.slabs import HostPool

_COPY_BYTES = 64 << 20
_SIZES = (1 << 20, 4 << 20, 16 << 20)


@dataclass(frozen=True, slots=True)
class Profile:
    """Rates of one rank's device and threads, bytes/s and parameters/s; memory in bytes."""

    fingerprint: str
    """Machine, device and threads it belongs to."""
    description: str
    """The same for a reader."""
    h2d: float
    """To the device, alone."""
    d2h: float
    """From the device, alone."""
    duplex: float
    """Both together."""
    dram: float
    """Host memory, reads plus writes: the most that the update and the copies drew together."""
    cpu_rates: dict[str, float]
    """Subgroup size -> parameters/s of the CPU's update, alone."""
    cpu_rate_under_copies: float
    """Parameters/s of the CPU's update while both directions copy."""
    device_rates: dict[str, float]
    """Subgroup size -> parameters/s of the device's update."""
    device_free: float
    """Device memory free when it was measured."""
    host_free: float
    """Host memory available when it was measured."""
    nvme: dict[str, dict[str, float]]
    """Path -> read and write bandwidth and free bytes."""
    seconds: float
    """Time that measuring took."""
    eight_bit_rates: dict[str, float] = field(default_factory=dict)
    """``cpu`` and ``device`` -> parameters/s of the update with 8-bit moments; empty where it cannot run."""

    def machine(
        self,
        *,
        ranks: int = 1,
        host_memory: float | None = None,
        device_free: float | None = None,
        device_free_backward: float = 0.0,
        size: int = _SIZES[-1],
        eight_bit: bool = False,
    ) -> Machine:
        """One rank's share.

        Args:
            ranks: ranks of this node, which share its memory and drives. The profile was measured by one of them with
                the threads of one, so the rates of the device and the CPU are a rank's already; DRAM is divided.
            host_memory: bytes this rank may take; None for 80% of what is free, divided.
            device_free: bytes free beside model and activations in the update; None for what was free.
            device_free_backward: the same in the backward pass.
            size: parameters per subgroup; the rates of the nearest measured size are used.
            eight_bit: take the rates of the update with 8-bit moments, where they were measured.
        """
        own = self.eight_bit_rates if eight_bit else {}
        nearest = str(min((int(key) for key in self.cpu_rates), key=lambda key: abs(key - size)))
        paths = self.nvme.values()
        return Machine(
            h2d=self.h2d,
            d2h=self.d2h,
            duplex=self.duplex,
            dram=self.dram / ranks,
            cpu_rate=own.get("cpu", self.cpu_rates[nearest]),
            device_rate=own.get("device", self.device_rates[nearest]),
            device_free=self.device_free if device_free is None else device_free,
            host_free=0.8 * self.host_free / ranks if host_memory is None else host_memory,
            device_free_backward=device_free_backward,
            nvme_read=sum(path["read"] for path in paths) / ranks,
            nvme_write=sum(path["write"] for path in paths) / ranks,
            nvme_free=sum(path["free"] for path in paths) / ranks,
        )

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(asdict(self), indent=2))
        partial.replace(path)


def load(path: Path, fingerprint: str | None = None) -> Profile:
    """Read what :meth:`Profile.save` wrote.

    Args:
        path: the file.
        fingerprint: of this machine; None to accept a profile of any, as when planning for another.

    Raises:
        UserError: if the file is no profile, or is of another machine.
    """
    try:
        profile = Profile(**json.loads(path.read_text()))
    except OSError as error:
        raise UserError(
            f"cannot read the profile {path}: {error.strerror}", fix="run: rewarm offload profile"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no offload profile of this version", fix="run: rewarm offload profile") from error
    if fingerprint is not None and profile.fingerprint != fingerprint:
        raise UserError(
            f"the profile {path} was measured elsewhere: {profile.description}",
            fix="run rewarm offload profile here, or remove the file",
        )
    return profile


def cache_path(fingerprint: str) -> Path:
    """Where the profile of a machine is kept: under XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "rewarm" / "offload" / f"{fingerprint}.json"


def describe(device: Device, threads: int, nvme_paths: Sequence[Path] = ()) -> tuple[str, str]:
    """Fingerprint of this machine with these threads and paths, and the sentence it is the digest of."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0))
    text = f"{platform.node()}, {model}, {cores} cores, {threads} threads, {device.name}"
    if nvme_paths:
        text += ", " + ", ".join(str(path.resolve()) for path in nvme_paths)
    return hashlib.sha256(text.encode()).hexdigest()[:16], text


def measure(
    device: Device, *, threads: int, nvme_paths: Sequence[Path] = (), seconds: float = 20.0, device_free: float = 0.0
) -> Profile:
    """Measure this machine.

    Args:
        device: the device of this rank.
        threads: threads of this rank's CPU update.
        nvme_paths: folders to measure.
        seconds: about how long it may take, NVMe included.
        device_free: bytes to report where the device does not say.

    Raises:
        UserError: if a path cannot be used or memory cannot be locked.
    """
    began = time.perf_counter()
    slice_ = seconds / (9 + 2 * len(_SIZES) + 2 * len(nvme_paths))
    bench = _Bench(device, threads, slice_)
    h2d, d2h, duplex = bench.link("h2d"), bench.link("d2h"), bench.both()
    cpu_rates = {str(size): bench.update(size) for size in _SIZES}
    under, drawn = bench.update_under_copies(_SIZES[-1])
    dram = max(drawn, bench.in_place(), max(cpu_rates.values()) * 28)
    device_rates = {str(size): bench.update(size, on_device=True) for size in _SIZES}
    quantized = {}
    if adamw.runs_on(torch.device("cpu")):
        quantized = {where: bench.update_8bit(_SIZES[-1], where == "device") for where in ("cpu", "device")}
    fingerprint, description = describe(device, threads, nvme_paths)
    drives = {}
    for path in nvme_paths:
        read, write = nvme.measure(path, seconds=slice_)
        space = os.statvfs(path)
        drives[str(path)] = {"read": read, "write": write, "free": float(space.f_bavail * space.f_frsize)}
    if device.torch_device.type == "cuda":
        device_free = float(torch.cuda.mem_get_info(device.torch_device)[0])
    bench.close()
    return Profile(
        fingerprint,
        description,
        h2d,
        d2h,
        duplex,
        dram,
        cpu_rates,
        under,
        device_rates,
        device_free,
        available_memory(),
        drives,
        time.perf_counter() - began,
        quantized,
    )


class _Bench:
    def __init__(self, device: Device, threads: int, seconds: float) -> None:
        self.device, self.threads, self.seconds = device, threads, seconds
        self.pool = HostPool(pin=device.pins, node=device.node)
        self.host = [self.pool.take(_COPY_BYTES, torch.uint8).fill_(1) for _ in range(2)]
        self.there = [torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device.torch_device) for _ in range(2)]

    def close(self) -> None:
        self.pool.close()

    def link(self, direction: str) -> float:
        return _rate(self.seconds, lambda: self._copy(direction), _COPY_BYTES)

    def both(self) -> float:
        return sum(self._beside()[1])

    def update(self, size: int, on_device: bool = False) -> float:
        run = self._updater(size, on_device)
        run()
        return _rate(self.seconds, run, size)

    def update_8bit(self, size: int, on_device: bool) -> float:
        where = self.device.torch_device if on_device else torch.device("cpu")
        master, moments = torch.zeros(size, device=where), adamw.Moments8bit.zeros(size, where)
        grad, out = (torch.zeros(size, dtype=torch.bfloat16, device=where) for _ in range(2))
        step = adamw.AdamWStep.prepare(step=10, learning_rate=1e-3)

        def run() -> None:
            began = time.perf_counter()
            adamw.update_8bit(step, master, moments, grad, out, threads=self.threads)
            self._end(size, began, on_device)

        run()
        return _rate(self.seconds, run, size)

    def _end(self, size: int, began: float, on_device: bool) -> None:
        if on_device:
            self.device.settle()
        else:
            self.device.pace_host(size, began)

    def update_under_copies(self, size: int) -> tuple[float, float]:
        """Parameters/s of the CPU's update while both directions copy, and bytes/s of host memory drawn by all."""
        run = self._updater(size)
        rate, copies = self._beside(run, size)
        return rate, rate * 28 + sum(copies)

    def in_place(self) -> float:
        from rewarm.kernels import native

        library = native.load()
        if library is None:
            return 0.0
        import ctypes

        size = _SIZES[-1]
        arrays = [torch.ones(size) for _ in range(4)]
        pointers = [ctypes.c_void_p(array.data_ptr()) for array in arrays]

        def probe(prefetch: int) -> None:
            library.rewarm_probe_in_place(ctypes.c_int64(size), *pointers, prefetch, self.threads)

        return max(_rate(self.seconds / 2, partial(probe, prefetch), 28 * size) for prefetch in (0, 1))

    def _copy(self, direction: str) -> None:
        with self.device.stream(direction):
            if direction == "h2d":
                self.device.copy(self.there[0], self.host[0], "h2d")
            else:
                self.device.copy(self.host[1], self.there[1], "d2h")

    def _updater(self, size: int, on_device: bool = False) -> Callable[[], None]:
        where = self.device.torch_device if on_device else torch.device("cpu")
        master, moment1, moment2 = (torch.zeros(size, device=where) for _ in range(3))
        grad, out = (torch.zeros(size, dtype=torch.bfloat16, device=where) for _ in range(2))
        step = adamw.AdamWStep.prepare(step=10, learning_rate=1e-3)

        def run() -> None:
            began = time.perf_counter()
            adamw.update(step, master, moment1, moment2, grad, out, threads=self.threads)
            self._end(size, began, on_device)

        return run

    def _beside(self, work: Callable[[], Any] | None = None, amount: float = 0.0) -> tuple[float, list[float]]:
        """Rate of some work, if any, while both directions copy, and their rates."""
        stop = threading.Event()
        moved = [0.0, 0.0]

        def copy(place: int, direction: str) -> None:
            while not stop.is_set():
                self._copy(direction)
                moved[place] += _COPY_BYTES

        threads = [threading.Thread(target=copy, args=pair) for pair in enumerate(("h2d", "d2h"))]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        rate = 0.0
        if work is None:
            time.sleep(self.seconds)
        else:
            rate = _rate(self.seconds, work, amount)
        stop.set()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - start
        return rate, [each / took for each in moved]


def _rate(seconds: float, work: Callable[[], Any], amount: float) -> float:
    """Amount per second of repeated work, by the fastest of the repetitions of about a tenth of the time each."""
    best, spent = 0.0, 0.0
    while spent < seconds:
        done, start = 0, time.perf_counter()
        while (took := time.perf_counter() - start) < seconds / 10 or done == 0:
            work()
            done += 1
        took = time.perf_counter() - start
        best, spent = max(best, amount * done / took), spent + took
    return best


def available_memory() -> float:
    """Bytes of host memory that this process may still take: what is free, within the limits of its control groups."""
    found = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found = float(line.split()[1]) * 1024
    name = next((line[3:] for line in _lines("/proc/self/cgroup") if line.startswith("0::")), "/")
    group = Path("/sys/fs/cgroup") / name.lstrip("/")
    for folder in (group, *group.parents):
        limit, used = (_lines(f"{folder}/memory.{what}") for what in ("max", "current"))
        if limit and used and limit[0].isdigit():
            found = min(found, float(limit[0]) - float(used[0]))
    return max(0.0, found)


def check_drives(paths: Sequence[str]) -> None:
    """Refuse a folder that is no place for what memory has no room for; Linux may even do direct I/O there.

    Raises:
        UserError: if there is no such folder, or it lies in memory.
    """
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    # The kernel writes a space in a name as \040.
    kinds = {Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), f[1])): f[2] for f in mounts}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"the NVMe path {path} is not a folder", fix="create it, or correct offload.nvme_paths")
        target = path.resolve()
        kind = next((kinds[folder] for folder in (target, *target.parents) if folder in kinds), "")
        if kind in ("tmpfs", "ramfs", "devtmpfs"):
            raise UserError(
                f"the NVMe path {path} lies in memory ({kind}), which it is meant to spare",
                fix="name a folder on a local drive in offload.nvme_paths",
            )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

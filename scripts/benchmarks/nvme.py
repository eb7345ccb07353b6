"""The NVMe tier against fio at the same pattern, and the host memory that a step over it takes.

    python scripts/benchmarks/nvme.py /local/nvme0 /local/nvme1 --gigabytes 1 --rounds 5

Both write and read files with direct I/O in blocks of 1 MiB, 64 in flight over all paths, blob after blob. Each round
runs fio and this project's store once, in changing order, both with random data; medians count, because drives (and the
hosts of virtual ones) have caches and moods. The project's buffers lie in huge pages where Linux grants them, which
makes requests of fewer segments; fio's do not, so the store is timed from small pages as well, and from buffers that
begin where a huge page does. Then optimizer steps with all state on the paths are run, and what the process grew by is
held against what the host pool says it took. fio has to be installed; a drive that others use at the same time measures
them as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
WAYS = ("write", "read")


def main() -> None:
    """Parse the command line, measure, and print a table and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="folders on local drives")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="written and read per round")
    parser.add_argument("--blob", type=float, default=256, help="MiB per blob, as one subgroup takes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1024], help="KiB per request of small pages")
    options = parser.parse_args()
    if shutil.which("fio") is None:
        parser.error("fio is not installed")
    size = round(options.blob * MIB / mmap.PAGESIZE) * mmap.PAGESIZE
    blobs = max(1, round(options.gigabytes * 1e9 / size))
    rates = bandwidths(options.paths, blobs, size, options.rounds, options.blocks)
    print(f"{'GB/s, median of rounds':32}{'write':>8}{'read':>8}{'against fio':>24}")
    middle = {name: tuple(statistics.median(each[way]) for way in WAYS) for name, each in rates.items()}
    for name, both in middle.items():
        ratios = " ".join(f"{way} {a / b:.2f}" for way, a, b in zip(WAYS, both, middle["fio"], strict=True))
        print(f"{name:32}{both[0] / 1e9:8.2f}{both[1] / 1e9:8.2f}{ratios:>24}")
    state, budget, grown = step_memory(options.paths)
    print(
        f"steps over {state / 1e6:.0f} MB of state on the paths: {budget / 1e6:.0f} MB of host memory and stand-in "
        f"device memory planned, resident set grew by {grown / 1e6:.0f} MB"
    )


def bandwidths(
    paths: list[Path], blobs: int, size: int, rounds: int, blocks: list[int]
) -> dict[str, dict[str, list[float]]]:
    """Who -> way -> bytes/s of each round; the first round, which writes where nothing was written, is left out."""
    import torch

    from rewarm.offload.runtime import nvme
    from rewarm.offload.runtime.nvme import Store
    from rewarm.offload.runtime.slabs import HostPool

    small = buffer(size, huge=False)
    pool = HostPool(pin=False).take(size, torch.uint8).random_()
    buffers = {"rewarm": (pool, nvme.BLOCK), "rewarm, begins on a huge page": (buffer(size, huge=True), nvme.BLOCK)}
    buffers |= {f"rewarm, small pages, {block} KiB": (small, block << 10) for block in blocks}
    found: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in (*buffers, "fio")}
    store = Store(paths, [size] * blobs)

    def move(name: str, way: str) -> float:
        transfer = store.write if way == "write" else store.read
        memory, nvme.BLOCK = buffers[name]
        start = time.perf_counter()
        for blob in range(blobs):
            transfer(blob, memory)
        return blobs * size / (time.perf_counter() - start)

    with contextlib.ExitStack() as stack:
        stack.callback(store.close)
        folders = [stack.enter_context(tempfile.TemporaryDirectory(dir=path)) for path in paths]
        files = [str(Path(folder) / "fio") for folder in folders]
        for number in range(rounds + 1):
            turn = number % len(found)
            for way in WAYS:
                for name in (*list(found)[turn:], *list(found)[:turn]):
                    rate = move(name, way) if name in buffers else fio(files, way, blobs * size)
                    if number:
                        found[name][way].append(rate)
    return found


def buffer(size: int, *, huge: bool) -> torch.Tensor:
    """Random bytes that begin where a huge page does, or that lie in small ones."""
    import torch

    region = mmap.mmap(-1, size + 2 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = torch.frombuffer(region, dtype=torch.uint8).data_ptr()
    skip = -start % (2 * MIB)
    region.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE, skip, size)
    return torch.frombuffer(region, dtype=torch.uint8, count=size, offset=skip).random_()


def fio(names: list[str], way: str, size: int) -> float:
    """Bytes/s that fio reaches with one queue of 64 blocks of 1 MiB over the files."""
    command = [
        "fio", "--name=rewarm", f"--filename={':'.join(names)}", "--file_service_type=roundrobin:1",
        f"--rw={way}", f"--size={size // MIB // len(names) * len(names)}M", "--bs=1M", "--iodepth=64",
        "--ioengine=libaio", "--direct=1", "--fallocate=posix", "--output-format=json",
    ]  # fmt: skip
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return float(json.loads(result.stdout)["jobs"][0][way]["bw_bytes"])


def step_memory(paths: list[Path]) -> tuple[float, float, float]:
    """Bytes of state on the paths, bytes planned in memory, and what the resident set grew by, over three steps."""
    import torch

    from rewarm.offload.planning.routes import Job, Placement, Route
    from rewarm.offload.runtime.device import ThrottledDevice
    from rewarm.offload.runtime.execute import Executor, GroupStep
    from rewarm.offload.runtime.slabs import HostPool, ParameterShard, StateLayout
    from rewarm.offload.runtime.states import States

    size, count = 4_000_000, 20
    layout = StateLayout.of([ParameterShard("all", size * count)], size)
    placement = Placement((Route.NVME_STREAMED,) * count, slots=2, host_slots=3)
    device, pool = ThrottledDevice(), HostPool(pin=False)
    before = resident()
    parameters, gradients = (torch.full((layout.numel,), 1e-3, dtype=torch.bfloat16) for _ in range(2))
    states = States(
        layout, placement, device, parameter_type=torch.bfloat16, gradient_type=torch.bfloat16, pool=pool,
        nvme_paths=paths,
    )  # fmt: skip
    for subgroup in range(count):
        states.write(subgroup, 0)
    job = Job(layout.numel, 0.0, 0.0)
    executor = Executor(layout, placement, job, device, states, parameters=parameters, gradients=gradients)
    most = 0.0
    for number in range(1, 4):
        executor.run_step(number, [GroupStep(1e-3)])
        most = max(most, resident())
    executor.close()
    states.close()
    slots = 2 * 12 * size
    return 12.0 * layout.numel, pool.taken + slots + 4.0 * layout.numel, most - before


def resident() -> float:
    """Bytes of anonymous memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    main()

"""Measured against predicted update time of several placements, with real threads and copies.

    python scripts/benchmarks/offload.py --link 0.5 --host 0.1 --elements 24000000 --subgroup 1000000

Without a GPU the device is a stand-in behind a link of the given bandwidth (GB/s each way) and the host's update is
slowed to the given rate (G parameters/s), so that streams mostly sleep and do not fight for the few cores; with a GPU,
leave both out. The device has room for its slots only, so that nothing can rest there. The machine is measured first;
each placement's update is then timed over some rounds and held against the simulator.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewarm.offload.planning.routes import Job, Machine, Placement
    from rewarm.offload.runtime.device import Device


def main() -> None:
    """Parse the command line, measure, run, and print one line per placement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=float, help="GB/s each way of the stand-in for a GPU")
    parser.add_argument("--host", type=float, default=float("inf"), help="G parameters/s of the host beside it")
    parser.add_argument("--elements", type=int, default=48_000_000)
    parser.add_argument("--subgroup", type=int, default=2_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="time for measuring the machine")
    parser.add_argument("--nvme", type=Path, help="folder on a local drive; adds a placement with state there")
    options = parser.parse_args()

    from rewarm.offload.planning.placement import interleave, search
    from rewarm.offload.planning.routes import Job, Placement, Route
    from rewarm.offload.runtime.device import ThrottledDevice, open_device
    from rewarm.offload.runtime.profile import measure

    rate = (options.link or 0) * 1e9
    stand_in = {"h2d": rate, "d2h": rate, "duplex": 2 * rate, "host_rate": options.host * 1e9}
    device = ThrottledDevice(**stand_in) if options.link else open_device()
    paths = [options.nvme] if options.nvme else []
    profile = measure(device, threads=options.threads, seconds=options.seconds, nvme_paths=paths)
    slots = 3
    machine = profile.machine(
        size=options.subgroup, device_free=(slots + 0.5) * 12 * options.subgroup, device_free_backward=1e12
    )
    job = Job(options.elements, forward=1e-6, backward=1e-6)
    count = -(-options.elements // options.subgroup)
    third = count // 3
    second = tuple(Route.STREAMED if i % 2 else Route.CPU for i in range(count))
    placements = [
        Placement((Route.CPU,) * count, name="all on the CPU"),
        Placement((Route.STREAMED,) * count, name="all streamed"),
        Placement((Route.STREAMED,) * count, split=True, name="all streamed, split master"),
        Placement(second, name="every second one streamed"),
        search(machine, job, count, slots=slots)[0].placement.renamed("chosen"),
    ]
    if paths:
        stored = interleave({Route.CPU: count - third, Route.NVME_STREAMED: third})
        placements.append(Placement(stored, name="one third on NVMe"))
    print(profile.description)
    print(f"{'':30}{'measured s':>12}{'predicted s':>13}{'ratio':>8}   routes")
    for placement in placements:
        predicted, measured = compare(device, machine, job, placement, options, paths)
        print(
            f"{placement.name:30}{measured:12.3f}{predicted:13.3f}{measured / predicted:8.2f}   {placement.describe()}"
        )


def compare(
    device: Device,
    machine: Machine,
    job: Job,
    placement: Placement,
    options: argparse.Namespace,
    paths: list[Path],
) -> tuple[float, float]:
    """Predicted and median measured seconds of one update."""
    import torch

    from rewarm.offload.planning.pipeline import predict
    from rewarm.offload.runtime.execute import Executor, GroupStep
    from rewarm.offload.runtime.slabs import HostPool, ParameterShard, StateLayout
    from rewarm.offload.runtime.states import States

    layout = StateLayout.of([ParameterShard("all", options.elements)], options.subgroup)
    parameters, gradients = (
        torch.zeros(layout.numel, dtype=torch.bfloat16, device=device.torch_device) for _ in range(2)
    )
    pool = HostPool(pin=device.pins, node=device.node)
    widths = {"parameter_type": torch.bfloat16, "gradient_type": torch.bfloat16}
    states = States(layout, placement, device, pool=pool, nvme_paths=paths, **widths)
    zeros = torch.zeros(layout.numel)
    states.load(zeros, zeros, zeros, parameters)
    executor = Executor(
        layout, placement, job, device, states,
        parameters=parameters, gradients=gradients, cpu_threads=options.threads,
    )  # fmt: skip
    times = []
    for number in range(1, options.rounds + 2):
        start = time.perf_counter()
        executor.run_step(number, [GroupStep(1e-4)])
        times.append(time.perf_counter() - start)
    executor.close()
    states.close()
    pool.close()
    return predict(machine, job, placement).seconds, statistics.median(times[1:])


if __name__ == "__main__":
    main()

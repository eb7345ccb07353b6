"""Ranks of a machine update on cores of their own, near their GPU, and the update's threads really run there."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patience import PATIENCE
from rewarm.offload.planning.routes import Job, Placement, Route
from rewarm.offload.runtime.cores import cores_of_node, divide
from rewarm.offload.runtime.device import ThrottledDevice, numa_node
from rewarm.offload.runtime.execute import Executor, GroupStep
from rewarm.offload.runtime.slabs import HostPool, ParameterShard, StateLayout
from rewarm.offload.runtime.states import States


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """Two nodes of four cores with two hardware threads each: 0-3 and 8-11 on the first."""
    for node, cores in enumerate(("0-3,8-11", "4-7,12-15")):
        write(tmp_path / f"devices/system/node/node{node}/cpulist", cores)
    for core in range(16):
        siblings = f"{core % 8},{core % 8 + 8}"
        write(tmp_path / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list", siblings)
    return tmp_path


def test_ranks_keep_to_the_node_of_their_gpu_and_share_no_core(two_sockets: Path) -> None:
    assert cores_of_node(1, two_sockets) == {4, 5, 6, 7, 12, 13, 14, 15}
    shares = divide([range(16)] * 4, [0, 1, 0, 1], two_sockets)
    assert shares == [(0, 1, 8, 9), (4, 5, 12, 13), (2, 3, 10, 11), (6, 7, 14, 15)]


def test_what_the_launcher_has_bound_stays_bound(two_sockets: Path) -> None:
    shares = divide([(0, 1), (2, 3), (4, 5)], [1, 0, 1], two_sockets)
    assert shares == [(0, 1), (2, 3), (4, 5)]  # the first is kept from its GPU's node by its mask


def test_without_nodes_an_even_share(tmp_path: Path) -> None:
    assert divide([range(5)] * 2, [None] * 2, tmp_path) == [(0, 1), (2, 3)]
    assert divide([range(2)] * 3, [None] * 3, tmp_path) == [(), (), ()]


@given(
    st.lists(st.tuples(st.sets(st.integers(0, 15), min_size=1), st.sampled_from([None, 0, 1])), min_size=1, max_size=6)
)
def test_no_core_is_in_two_shares(ranks: list[tuple[set[int], int | None]]) -> None:
    shares = divide([sorted(mask) for mask, _ in ranks], [node for _, node in ranks])
    given_out = [core for share in shares for core in share]
    assert len(given_out) == len(set(given_out))
    assert all(set(share) <= mask for share, (mask, _) in zip(shares, ranks, strict=True))


@pytest.mark.parametrize(("text", "node"), [("1", 1), ("-1", None), ("", None)])
def test_the_node_of_a_gpu(text: str, node: int | None, two_sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is hexadecimal in /sys and a number in torch; -1 is Linux's word for not knowing."""
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    write(two_sockets / "bus/pci/devices/0000:c1:02.0/numa_node", text)
    assert numa_node(0, two_sockets) == node
    (two_sockets / "devices/system/node/node1/cpulist").unlink()
    (two_sockets / "devices/system/node/node1").rmdir()
    assert numa_node(0, two_sockets) is None  # nothing to choose


def test_a_gpu_whose_address_torch_does_not_tell(two_sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="old"))
    assert numa_node(0, two_sockets) is None


def restricted(cores: set[int]) -> list[str]:
    """Names of this process's threads that may run on these cores alone."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            if os.sched_getaffinity(int(task.name)) == cores:
                found.append((task / "comm").read_text().strip())
        except (ProcessLookupError, FileNotFoundError):
            continue  # it has ended meanwhile
    return found


def pinned(cores: list[int]) -> Executor:
    """Updates two subgroups with a team of three."""
    layout = StateLayout.of([ParameterShard("w", 400_000)], 200_000)
    placement = Placement((Route.CPU,) * 2)
    parameters, gradients = torch.zeros(layout.numel, dtype=torch.bfloat16), torch.ones(layout.numel)
    device = ThrottledDevice()
    widths = {"parameter_type": parameters.dtype, "gradient_type": gradients.dtype}
    states = States(layout, placement, device, pool=HostPool(pin=False), **widths)
    zeros = torch.zeros(layout.numel)
    states.load(zeros, zeros, zeros, parameters)
    job = Job(layout.numel, 0.0, 0.0, grad_bytes=4)
    return Executor(
        layout, placement, job, device, states,
        parameters=parameters, gradients=gradients, cpu_threads=3, cores=cores,
    )  # fmt: skip


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is always where everything runs")
def test_the_team_of_the_update_runs_on_its_cores_and_nobody_else_does() -> None:
    mask = os.sched_getaffinity(0)
    core = max(mask)
    before = restricted({core})
    executor = pinned([core])
    executor.run_step(1, [GroupStep(1e-3)])
    # The stream and the two others of its team, which sleep until the next update.
    assert len(restricted({core})) - len(before) == 3, restricted({core})
    assert os.sched_getaffinity(0) == mask == os.sched_getaffinity(threading.get_native_id())
    torch.ones(200_000).mul_(2)  # torch's own team is made by this thread
    assert len(restricted({core})) - len(before) == 3
    executor.close()
    deadline = time.monotonic() + PATIENCE  # the team ends a moment after its stream
    while restricted({core}) != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert restricted({core}) == before


def test_cores_that_were_taken_away_are_told_and_the_update_is_made(caplog: pytest.LogCaptureFixture) -> None:
    executor = pinned([100_000])
    timeline = executor.run_step(1, [GroupStep(1e-3)])
    assert timeline.seconds > 0 and "may not use [100000]" in caplog.text
    executor.close()

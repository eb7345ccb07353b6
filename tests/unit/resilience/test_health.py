"""What is said of nodes before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewarm.errors import NodeFault, UserError
from rewarm.resilience.health import NodeReport, check_device, compare


def report(node: str, **changes: float) -> NodeReport:
    values = {"clock": 1000.0, "work_seconds": 0.01, "reduce_seconds": 0.02, "free_disk": 1 << 40}
    return NodeReport(node, **{**values, **changes})  # type: ignore[arg-type]


def test_healthy_nodes_are_summed_up_in_a_line() -> None:
    assert compare([report("a"), report("a"), report("b", reduce_seconds=0.03)], Path("r"), 1 << 20) == [
        "3 ranks on 2 nodes, all-reduce of 16 MiB: 30.0 ms"
    ]


def test_one_machine_needs_no_line() -> None:
    assert compare([report("a"), report("a")], Path("r"), 1 << 20) == []


def test_a_wrong_clock_names_its_node() -> None:
    with pytest.raises(NodeFault, match="node b: its clock is -120 s off") as error:
        compare([report("a"), report("b", clock=880.0), report("c")], Path("r"), 1 << 20)
    assert error.value.node == "b"


def test_a_full_disk_is_for_the_user_to_mend() -> None:
    with pytest.raises(UserError, match="node b finds only 10 MiB.*runs/x.* takes 64 MiB"):
        compare([report("a"), report("b", free_disk=10 << 20)], Path("runs/x"), 64 << 20)


def test_slow_and_skewed_nodes_are_mentioned() -> None:
    odd = compare([report("a"), report("b", clock=1005.0), report("c", work_seconds=0.05)], Path("r"), 1 << 20)
    assert odd[:2] == [
        "node b: its clock is +5.0 s off that of the others",
        "node c: computes 5.0 times slower than the median",
    ]


def test_missing_gpus_name_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(NodeFault, match="node gpu07: SLURM gave 8 GPUs, but torch finds none"):
        check_device()
